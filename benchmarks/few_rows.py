"""How fast a CPU reads weights for a few rows, in GB/s: python benchmarks/few_rows.py [--rows 1 2 3 4 5 6 8] [--threads 1 2] [--runs 5]

Columns: torch's `F.linear` and `vlm.model.linear`, of all linear maps of six of BERT-base's layers with cross-attention and of BLIP's vocabulary, so
that no cache holds them (300 MB); both in turn, medians. Results: RESULTS.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.model.linear import linear

LAYERS = 6
LAYER = [(768, 768)] * 6 + [(3072, 768), (768, 3072)]
VOCABULARY = (30_524, 768)


def main() -> int:
    parser = argparse.ArgumentParser(description="GB/s of weights read for a few rows; Markdown.")
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8], metavar="R")
    add("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    add("--runs", type=int, default=5, metavar="N", help="of each way (default: %(default)s)")
    given = parser.parse_args()
    if min(*given.rows, *given.threads, given.runs) < 1:
        parser.error("--rows, --threads and --runs: give at least 1")
    weights = [torch.randn(shape) for shape in [*LAYER * LAYERS, VOCABULARY]]
    size = sum(weight.numel() * weight.element_size() for weight in weights) / 1e9
    print("| threads | rows | F.linear | ours | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for threads in given.threads:
        torch.set_num_threads(threads)
        for rows in given.rows:
            plain, ours = (size / seconds for seconds in compared(weights, rows, given.runs))
            print(f"| {threads} | {rows} | {plain:.1f} | {ours:.1f} | {ours / plain:.2f} x |", flush=True)
    return 0


@torch.no_grad()
def compared(weights: list[Tensor], rows: int, runs: int) -> tuple[float, float]:
    """Median seconds of a pass over all weights, torch's and ours."""
    states = {width: torch.randn(rows, width) for width in {weight.shape[1] for weight in weights}}
    bias = {outputs: torch.randn(outputs) for outputs in {weight.shape[0] for weight in weights}}
    ways: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [F.linear, linear]
    seconds: list[list[float]] = [[], []]
    for run in range(runs + 1):
        for way, spent in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            for weight in weights:
                way(states[weight.shape[1]], weight, bias[weight.shape[0]])
            if run:  # the first warms up
                spent.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    sys.exit(main())
