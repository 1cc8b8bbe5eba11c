"""A captioning step on a CPU, with and without what makes it faster: python benchmarks/cpu_training.py [--runs 3]

Folded batch norm, kept memory, bf16, a frozen image encoder, its features stored. Where it is not frozen, the image encoder trains its last two
stages, as configs/finetune/captioning/photos_small.yaml does. Random weights and content. Each variant runs in a process of its own, all in turn, so
that a change of the machine's speed meets all; medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
from typing import NamedTuple


class Variant(NamedTuple):
    """fold: frozen batch norms are folded. keep: freed memory is kept. stages: of the image encoder, trained. stored: it is not run at all."""

    fold: bool = True
    keep: bool = True
    precision: str = "bf16"
    stages: int = 2
    stored: bool = False


VARIANTS = {
    "as it is": Variant(fold=False, keep=False),
    "folded": Variant(keep=False),
    "kept memory": Variant(fold=False),
    "both": Variant(),
    "both, fp32": Variant(precision="fp32"),
    "frozen": Variant(stages=0),
    "stored": Variant(stages=0, stored=True),
    "frozen, fp32": Variant(precision="fp32", stages=0),
    "stored, fp32": Variant(precision="fp32", stages=0, stored=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="A captioning step on a CPU, with and without what vlm does to speed it up."
    )
    parser.add_argument(
        "--image-encoder", default="tf_efficientnet_lite2", metavar="NAME", help="timm model (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images in a step (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=3, metavar="N", help="captions of an image (default: %(default)s)")
    parser.add_argument(
        "--runs", type=int, default=3, metavar="N", help="processes of each variant (default: %(default)s)"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"of {[*VARIANTS]} (default: all)",
    )
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("batch", "texts", "runs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: give at least 1")
    if arguments.variant is not None:
        print(
            json.dumps(measure(arguments.image_encoder, arguments.batch, arguments.texts, VARIANTS[arguments.variant]))
        )
        return 0
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.variants}
    for _ in range(arguments.runs):
        for name in arguments.variants:
            command = [sys.executable, *sys.argv, "--variant", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"cpu_training: {name} ended with status {done.returncode}", file=sys.stderr)
                return 1
            found[name].append(json.loads(done.stdout))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    base = medians[arguments.variants[0]]["seconds"]
    for name, values in medians.items():
        print(
            f"{name:<13} {values['seconds']:.2f} s a step ({base / values['seconds']:.2f} x), {values['faults']:,.0f} page faults a step, "
            f"{values['gib']:.1f} GiB at most"
        )
    return 0


def measure(image_encoder: str, batch: int, texts: int, variant: Variant) -> dict[str, float]:
    """Median seconds of a step, its page faults, and the largest size of the process."""
    import resource
    import time
    from dataclasses import replace

    import torch

    from vlm.config import ImageConfig, ModelConfig, TextConfig
    from vlm.data.batch import Batch
    from vlm.memory import keep_freed_memory
    from vlm.model.image_encoder import ImageEncoder
    from vlm.model.vision_language import VisionLanguageModel
    from vlm.objectives.captioning import Captioning
    from vlm.tasks.task import Task
    from vlm.train.precision import autocast

    if variant.keep:
        keep_freed_memory()
    if not variant.fold:
        ImageEncoder._folded_backbone = lambda self: self.backbone  # type: ignore[method-assign]
    image = ImageConfig(name=image_encoder, image_size=224, trainable_blocks=variant.stages, batch_norm="frozen")
    text = TextConfig(
        vocab_size=10000, max_positions=64, cross_attention=(2, 3, 4, 5), dropout=0.0, attention_dropout=0.0
    )
    task = Task(
        VisionLanguageModel(ModelConfig(image=image, text=text)), {"captioning": Captioning()}, {"captioning": 1.0}
    ).train()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], fused=True)
    given = Batch.fake(batch, image_size=224, vocab_size=10000, length=24, texts_per_image=texts)
    if variant.stored:
        encoder = task.model.image_encoder
        given = replace(given, images=torch.randn(batch, encoder.tokens(), encoder.frozen_dim).half())

    def step() -> float:
        start = time.perf_counter()
        with autocast(variant.precision, torch.device("cpu")):
            loss = task(given)["captioning"]
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = [step() for _ in range(5)]
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": statistics.median(seconds),
        "faults": (used.ru_minflt - before) / 5,
        "gib": used.ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    sys.exit(main())
