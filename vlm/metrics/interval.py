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
    names = range(len(values)) if groups is None else groups
    return bootstrap_parts(values, [None] * len(values), names, level, resamples, seed)[None]


def bootstrap_parts(
    values: Sequence[float],
    parts: Sequence[Hashable],
    groups: Sequence[Hashable],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[Hashable, tuple[float, float]]:
    """By part (a type of question) the interval of the mean of its values, from the same resamples of the groups (images) for all parts.

    A resample that holds nothing of a part says nothing about it. Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values to take the mean of")
    index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    column = {part: i for i, part in enumerate(dict.fromkeys(parts))}
    places = [index[group] for group in groups], [column[part] for part in parts]
    sums, counts = np.zeros((2, len(index), len(column)))
    np.add.at(sums, places, np.asarray(values, dtype=np.float64))
    np.add.at(counts, places, 1.0)
    generator, even = np.random.default_rng(seed), np.full(len(index), 1 / len(index))
    drawn = (generator.multinomial(len(index), even).astype(np.float64) for _ in range(resamples))
    with np.errstate(invalid="ignore"):
        means = np.stack([(times @ sums) / (times @ counts) for times in drawn])
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {part: (float(low[i]), float(high[i])) for part, i in column.items()}
