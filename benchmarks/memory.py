"""Peak memory and time of a pretraining step, plain, in micro-batches, with checkpointing: python benchmarks/memory.py [--device cuda]

Contrastive, matching and masked language on random weights and content. Each row is a process of its own: on a CPU the most memory that the process
ever had, on a GPU the most that PyTorch had allocated. Every row makes the same optimizer step of `--batch` images, except that hard negatives
come from the micro-batch: the contrastive loss compares the whole batch in each. Prints a Markdown table.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# By name: whether in micro-batches, checkpointing of the image encoder, of the text Transformer.
ROWS = {
    "plain": (False, False, False),
    "checkpointing: image": (False, True, False),
    "checkpointing: text": (False, False, True),
    "checkpointing: both": (False, True, True),
    "micro-batches": (True, False, False),
    "micro-batches, checkpointing: both": (True, True, True),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Peak memory and time of a pretraining step: plain, in micro-batches, with checkpointing; a Markdown table."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16", help="as train.precision (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images in a step (default: %(default)s)")
    parser.add_argument(
        "--accumulate",
        type=int,
        default=4,
        metavar="N",
        help="micro-batches where there are any (default: %(default)s)",
    )
    parser.add_argument(
        "--image-encoder", default="vit_small_patch16_224", metavar="NAME", help="timm model (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size", type=int, default=128, metavar="N", help="side in pixels (default: %(default)s)"
    )
    parser.add_argument("--dim", type=int, default=384, metavar="N", help="width of the text (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, metavar="N", help="layers of the text (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="timed steps a row (default: %(default)s)")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in ("batch", "accumulate", "image_size", "dim", "layers", "steps"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(given, name)}: give at least 1")
    if given.batch % given.accumulate:
        parser.error(f"--batch {given.batch} is not a multiple of --accumulate {given.accumulate}")
    if given.row is not None:
        print(json.dumps(measure(given, *ROWS[given.row])))
        return 0
    found: dict[str, dict[str, float]] = {}
    for row in ROWS:
        done = subprocess.run([sys.executable, *sys.argv, "--row", row], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"memory: {row} ended with status {done.returncode}", file=sys.stderr)
            return 1
        found[row] = json.loads(done.stdout.splitlines()[-1])
    print(table(found, given.batch, given.accumulate))
    return 0


def table(found: dict[str, dict[str, float]], batch: int, accumulate: int) -> str:
    """Markdown, of what `measure` found by row."""
    lines = [
        f"| step of {batch} images | peak memory | of it the step's | s a step | processor s a step |",
        "| --- | --- | --- | --- | --- |",
    ]
    base = found["plain"]
    for row, values in found.items():
        name = row.replace("micro-batches", f"{accumulate} micro-batches of {batch // accumulate}")
        step, plain = values["peak"] - values["rest"], base["peak"] - base["rest"]
        times = (f"{values[kind]:.2f} ({values[kind] / base[kind]:.2f} x)" for kind in ("seconds", "processor_seconds"))
        lines.append(
            f"| {name} | {values['peak']:.2f} GiB | {step:.2f} GiB ({step / plain:.2f} x) | {' | '.join(times)} |"
        )
    return "\n".join(lines)


def measure(given: argparse.Namespace, parts: bool, image: bool, text: bool) -> dict[str, float]:
    """Peak memory in GiB; `rest`, what is there between steps: the program, weights, the optimizer's moments, but no gradients; seconds a step."""
    import time

    import torch

    from vlm.config import Config, ImageConfig, ModelConfig, ObjectivesConfig, TextConfig, TrainConfig
    from vlm.data.batch import Batch
    from vlm.model.vision_language import VisionLanguageModel
    from vlm.tasks.pretraining import Pretraining
    from vlm.train.distributed import Ranks
    from vlm.train.trainer import Trainer

    torch.manual_seed(0)
    count = given.accumulate if parts else 1
    layers, first = given.layers, given.layers // 2
    model = ModelConfig(
        image=ImageConfig(name=given.image_encoder, image_size=given.image_size, checkpointing=image),
        text=TextConfig(
            vocab_size=8000,
            dim=given.dim,
            heads=max(1, given.dim // 64),
            layers=layers,
            feed_forward_dim=4 * given.dim,
            cross_attention=tuple(range(first, layers)),
            checkpointing=text,
        ),
        fusion="late",
    )
    config = Config(model=model, train=TrainConfig(accumulate=count, precision=given.precision))
    task = Pretraining(VisionLanguageModel(model), ObjectivesConfig())
    trainer = Trainer(
        task, _Loader(), config, Ranks(0, 1, torch.device(given.device)), None, lambda name, *_: Path(name)
    )

    def micro(images: int) -> list[Batch]:
        size = given.image_size
        return [Batch.fake(images, size, 8000, 24, masked=True, seed=seed) for seed in range(count)]

    trainer.try_step(micro(2))
    batches = micro(given.batch // count)
    cuda = given.device == "cuda"
    rest = torch.cuda.memory_allocated() if cuda else _resident()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.try_step(batches)  # the first one of a shape is slower
    start, processor = time.perf_counter(), time.process_time()
    for _ in range(given.steps):
        trainer.try_step(batches)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    return {
        "peak": peak / 2**30,
        "rest": rest / 2**30,
        "seconds": seconds / given.steps,
        "processor_seconds": processor / given.steps,
    }


class _Loader:
    """In place of data: the trainer only asks how long an epoch is."""

    steps = 1000

    def iterate(self, epoch: int, start_step: int = 0, stop_step: int | None = None) -> Iterator[Any]:
        """None."""
        raise NotImplementedError


def _resident(field: str = "VmRSS") -> float:
    """Bytes of this process's memory, now or (VmHWM) at its largest."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status[field].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
