"""How far a score could be off because other images might have been drawn: bootstrap intervals (Efron 1979)."""

from collections.abc import Hashable, Sequence

import numpy as np


def bootstrap(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of the mean that holds `level` of the means of resamples.

    groups: what is drawn, with all its values (the image of each question); by default each value by itself. Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values to take the mean of")
    names = range(len(values)) if groups is None else groups
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    rows = np.array([index[name] for name in names])
    sums = np.bincount(rows, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(rows)
    generator, even = np.random.default_rng(seed), np.full(len(index), 1 / len(index))
    drawn = (generator.multinomial(len(index), even) for _ in range(resamples))
    means = [(times @ sums) / (times @ counts) for times in drawn]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
