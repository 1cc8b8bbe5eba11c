"""What objectives.py concludes from its runs: means, paired differences with their intervals and verdicts, and the tables."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SETS = {"contrastive": 1, "+ matching": 2, "+ masked language": 3}  # how many of OBJECTIVES, each with weight 1
MEASURES = {"embeddings": "R@1, embeddings", "reranked": "R@1, re-ranked", "cider": "CIDEr"}
NO_HEAD = "no matching head was trained"
RESAMPLES = 2000
Cells = dict[tuple[str, int, str], dict[str, Any]]


def interval(values: NDArray) -> tuple[float, float]:
    """95 % of the means of resamples of values (S, N), of which both the S seeds and the N images are drawn anew; with one seed as
    vlm.metrics.interval.
    """
    seeds, images = values.shape
    generator = np.random.default_rng(0)
    times = generator.multinomial(images, np.full(images, 1 / images), RESAMPLES)
    seed_times = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    means = ((seed_times @ values) * times).sum(1) / values.size
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def verdict(low: float, high: float) -> str:
    """What the interval of a difference says."""
    return "rises" if low > 0 else "falls" if high < 0 else "not told apart"


def summarize(encoders: Sequence[str], seeds: int, cells: Cells) -> dict[str, Any]:
    """Means of each set and differences between one and the next, with their intervals and the seeds' own means.

    For contrastive alone there is no second look: + matching, re-ranked, is compared with its embeddings.
    """
    scores, differences = [], []
    for encoder, (measure, title) in itertools.product(encoders, MEASURES.items()):
        before: NDArray | None = None
        for name in SETS:
            runs = [cells[encoder, seed, name] for seed in range(seeds)]
            row = {"encoder": encoder, "set": name, "measure": title}
            shown = measure if runs[0][measure] is not None else "embeddings"
            values = np.array([run[shown] for run in runs])
            scores.append(row | (_told(values) if shown == measure else {"missing": NO_HEAD}))
            if before is not None:
                told = _told(values - before)
                differences.append(row | told | {"verdict": verdict(told["low"], told["high"])})
            before = values
    return {"scores": scores, "differences": differences}


def _told(values: NDArray) -> dict[str, Any]:
    low, high = interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high, "by_seed": values.mean(1).tolist()}


def lines(summary: dict[str, Any]) -> Iterator[str]:
    """Two tables in Markdown."""
    yield "| encoder | objectives | " + " | ".join(MEASURES.values()) + " |"
    yield "| --- | --- |" + " --- |" * len(MEASURES)
    rows = {(r["encoder"], r["set"], r["measure"]): r for r in summary["scores"]}
    for encoder, name in dict.fromkeys((r["encoder"], r["set"]) for r in summary["scores"]):
        found = [rows[encoder, name, title] for title in MEASURES.values()]
        yield f"| {encoder} | {name} | " + " | ".join(_shown(row) for row in found) + " |"
    yield ""
    yield "| encoder | what is added | measure | difference | by seed | verdict |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for r in summary["differences"]:
        seeds = ", ".join(f"{value:+.1f}" for value in r["by_seed"])
        yield f"| {r['encoder']} | {r['set']} | {r['measure']} | {_shown(r, '+')} | {seeds} | {r['verdict']} |"


def _shown(row: dict[str, Any], sign: str = "") -> str:
    if "missing" in row:
        return f"none: {row['missing']}"
    return f"{row['mean']:{sign}.1f} ({row['low']:{sign}.1f} to {row['high']:{sign}.1f})"
