"""A pretraining step of ours and the same step from transformers' modules as the originals do it: python benchmarks/pretrain_step.py --step albef

ViT-B/16 at 256 px, BERT-base, on random content. albef: contrastive with queue and teacher, matching, masked language; 6 + 6 layers. blip:
contrastive with queue and teacher, matching, captioning; 12 layers that fuse. First both compute two steps on the same weights, words and
negatives, and nothing is timed unless their losses are equal. Then each runs in processes of its own, in turn, so that a change of the machine's
speed meets both; medians. `reference_steps.py` says what the originals do, `step_pair.py` what a batch holds. Results: RESULTS.md.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

SIDES = ("ours", "reference")
TOLERANCE = 1e-3  # of a loss, in fp32
H200_PEAK = 989e12  # floating-point operations a second, dense bf16


def main() -> int:
    parser = argparse.ArgumentParser(description="A pretraining step beside the originals'.")
    add = parser.add_argument
    add("--step", choices=("albef", "blip"), default="albef")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch", type=int, metavar="N", help="pairs in a step (default: 4 on a CPU, 128 on a GPU)")
    add(
        "--precision", choices=("fp32", "bf16"), help="of both, by autocast (default: bf16 where it is fast, else fp32)"
    )
    add("--pad", type=int, default=30, metavar="L", help="the reference's text length; 0: the longest (default: 30)")
    add("--runs", type=int, default=3, metavar="N", help="processes of each side (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="timed steps of a process (default: 3 on a CPU, 20 on a GPU)")
    add("--json", action="store_true", help="one JSON object instead of a table")
    add("--profile", action="store_true", help="print where each side's time goes instead")
    add("--tiny", action="store_true", help="a model of no use but to try the benchmark itself")
    add("--part", choices=("compare", *SIDES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    from vlm.train.precision import fastest

    given.precision = given.precision or ("bf16" if fastest(torch.device(given.device)) == "bf16" else "fp32")
    gpu = given.device == "cuda"
    given.batch = (128 if gpu else 4) if given.batch is None else given.batch
    given.steps = (20 if gpu else 3) if given.steps is None else given.steps
    for name, least in (("batch", 2), ("runs", 1), ("steps", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name} {getattr(given, name)}: give at least {least}")
    if given.part is not None:
        print(json.dumps(compared(given) if given.part == "compare" else measured(given)))
        return 0
    return run(given)


def run(given: argparse.Namespace) -> int:
    """All parts, each in a process of its own; the exit status."""
    comparison = start("compare")
    if comparison is None:
        return 1
    for number, losses in enumerate(comparison["losses"], 1):
        for name, (ours, reference) in losses.items():
            print(f"step {number} {name:<16} ours {ours:.6f} reference {reference:.6f}", file=sys.stderr)
    if not comparison["difference"] <= TOLERANCE:
        print(
            f"pretrain_step: the losses differ by {comparison['difference']:.1e}, more than {TOLERANCE}: nothing is timed",
            file=sys.stderr,
        )
        return 1
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(1 if given.profile else given.runs):
        for side in SIDES:
            values = start(side)
            if values is None:
                return 1
            found[side].append(values)
    if not given.profile:
        result = summary(given, comparison, found)
        print(json.dumps(result)) if given.json else print_table(result)
    return 0


def start(part: str) -> Any:
    """What a process for that part found; None, and a line, where it failed."""
    done = subprocess.run([sys.executable, *sys.argv, "--part", part], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"pretrain_step: {part} ended with status {done.returncode}", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def summary(
    given: argparse.Namespace, comparison: dict[str, Any], found: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    """Medians of both sides and their ratios."""
    sides: dict[str, dict[str, float]] = {}
    for side, flops in zip(SIDES, comparison["flops"], strict=True):
        seconds = statistics.median(run["seconds"] for run in found[side])
        rate = given.batch / seconds
        sides[side] = {
            "pairs_per_second": rate,
            "seconds_per_step": seconds,
            "cpu_seconds_per_step": statistics.median(run["cpu_seconds"] for run in found[side]),
            "peak_gib": statistics.median(run["gib"] for run in found[side]),
            "gflop_per_pair": flops / 1e9,
            "tflops": flops * rate / 1e12,
        }
    ours, reference = (sides[side] for side in SIDES)
    return {
        "step": given.step,
        "device": torch.cuda.get_device_name() if given.device == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "precision": given.precision,
        "batch": given.batch,
        "difference": comparison["difference"],
        "matmul_tflops": statistics.median(run["matmul_tflops"] for runs in found.values() for run in runs),
        **sides,
        "speedup": ours["pairs_per_second"] / reference["pairs_per_second"],
        "cpu_speedup": reference["cpu_seconds_per_step"] / ours["cpu_seconds_per_step"],
        "flop_ratio": reference["gflop_per_pair"] / ours["gflop_per_pair"],
    }


def print_table(result: dict[str, Any]) -> None:
    """One line a side, then the ratios."""
    print(f"{result['step']}, batch {result['batch']}, {result['precision']}, {result['device']}")
    for side in SIDES:
        values = result[side]
        print(
            f"{side:<10} {values['pairs_per_second']:8.2f} pairs/s {values['seconds_per_step']:8.3f} s a step {values['peak_gib']:6.1f} GiB "
            f"{values['gflop_per_pair']:6.0f} GFLOP a pair {values['tflops']:7.2f} TFLOP/s"
        )
    print(f"ours is {result['speedup']:.2f} x as fast, with {1 / result['flop_ratio']:.2f} x the operations")
    if result["device"].endswith("CPU threads"):  # what other programs take does not count
        print(f"by the processor's time, ours is {result['cpu_speedup']:.2f} x as fast")
    print(f"the largest matrix product here: {result['matmul_tflops']:.2f} TFLOP/s")
    if "H200" in result["device"] and result["precision"] == "bf16":
        print(f"MFU {100 * result['ours']['tflops'] * 1e12 / H200_PEAK:.1f} % of 989 TFLOP/s")


def compared(given: argparse.Namespace) -> dict[str, Any]:
    """Losses and counted operations of both sides, in fp32."""
    from step_pair import compare

    found = compare(given.step, given.batch, given.pad, torch.device(given.device), given.tiny)
    return {"losses": found.losses, "flops": found.flops, "difference": found.difference}


def measured(given: argparse.Namespace) -> dict[str, float]:
    """Mean seconds of a step, the largest size of the process or of its GPU memory, and the machine's rate at a large matrix product."""
    device = torch.device(given.device)
    step = our_loop(given, device) if given.part == "ours" else reference_loop(given, device)
    for _ in range(1 if device.type == "cpu" else 3):
        step()
    finish(device)
    if given.profile:
        profile(given.part, step, device)
        return {}
    begin, used = time.perf_counter(), time.process_time()
    for _ in range(given.steps):
        step()
    finish(device)
    seconds, cpu_seconds = (time.perf_counter() - begin) / given.steps, (time.process_time() - used) / given.steps
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        gib = torch.cuda.max_memory_allocated() / 2**30
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "gib": gib,
        "matmul_tflops": matmul_rate(device, given.precision, given.tiny),
    }


def our_loop(given: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    """The trainer's own step, with the allocator's settings of `vlm train`."""
    from step_pair import draw_batch, our_step, settings

    from vlm.memory import keep_freed_memory
    from vlm.train.distributed import Ranks
    from vlm.train.meter import Meter
    from vlm.train.trainer import Trainer

    if device.type == "cpu":
        keep_freed_memory()
    config = settings(given.step, given.tiny, precision=given.precision)
    task = our_step(config)
    trainer = Trainer(task, SimpleNamespace(steps=10_000), config, Ranks(0, 1, device), None, lambda *_: None)  # type: ignore[arg-type]
    batch, meter = draw_batch(config, given.batch).to(device), Meter(task.weights)
    return lambda: trainer._step([batch], meter)


def reference_loop(given: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    """The originals' loop: each loss is read at each step; AdamW in its default form, one rate and decay for all."""
    from step_pair import as_published, draw_batch, reference_step, settings

    config = settings(given.step, given.tiny)
    batch = draw_batch(config, given.batch)
    images = batch.images / 127.5 - 1.0  # there the loader does it
    data = as_published(batch, images, given.pad).to(device)
    model = reference_step(config).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)

    def step() -> list[float]:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16"):
            losses = list(model(data).values())
        sum(losses[1:], losses[0]).backward()
        optimizer.step()
        return [loss.item() for loss in losses]

    return step


def finish(device: torch.device) -> None:
    """Waits for what was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: torch.device, precision: str, tiny: bool) -> float:
    """10^12 floating-point operations a second of a large square matrix product; the best of five."""
    side = 256 if tiny else 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        a @ a
        finish(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best / 1e12


def profile(side: str, step: Callable[[], object], device: torch.device) -> None:
    """Where one step's time goes, by operation."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profiler(activities=activities) as found:
        step()
        finish(device)
    order = f"self_{device.type}_time_total"
    print(f"{side}\n{found.key_averages().table(sort_by=order, row_limit=20)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
