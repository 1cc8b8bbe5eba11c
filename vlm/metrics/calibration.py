"""How far an answer's confidence can be believed, and the one temperature that makes it so on average.

The confidence of an answer of probability p at temperature T is p^(1/T): between 0 and 1, higher for higher p, and p itself at T = 1. It needs no
more than the one probability that ranking, generation and a classifier's sigmoid all give, and its mean over some questions can be any share, which
the usual sigmoid(logit / T) cannot (it never crosses a half). Below, accuracies are shares: official VQA accuracies, so between 0 and 1 too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 10
HOTTEST = 1e6


def calibrated(probability: float, temperature: float) -> float:
    """The confidence, 0..1."""
    return float(min(1.0, max(0.0, probability)) ** (1.0 / temperature))


def fit_temperature(probabilities: Sequence[float], accuracies: Sequence[float]) -> float:
    """The temperature at which the mean confidence is the mean accuracy, by bisection (the mean confidence rises with it).

    Raises ValueError where there is none: no answers, all of them right or all wrong, or the mean cannot become so low because that many of the
    probabilities are 1, nor so high because they are 0.
    """
    if len(probabilities) != len(accuracies) or not probabilities:
        raise ValueError(f"{len(probabilities)} probabilities and {len(accuracies)} accuracies; give as many, above 0.")
    with np.errstate(divide="ignore"):
        logs = np.log(np.clip(np.asarray(probabilities, dtype=np.float64), 0.0, 1.0))
    wanted = float(np.mean(accuracies))
    low, high = 1.0 / HOTTEST, HOTTEST

    def mean(temperature: float) -> float:
        return float(np.exp(logs / temperature).mean())

    if not mean(low) < wanted < mean(high):
        raise ValueError(
            f"an accuracy of {wanted:.4g} is outside of what the mean confidence can be ({mean(low):.4g} to {mean(high):.4g})."
        )
    while high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean(middle) < wanted else (low, middle)
    return math.sqrt(low * high)


@dataclass(frozen=True)
class Bin:
    """Answers of like confidence: how many, the mean of their confidences, and of their accuracies."""

    count: int
    confidence: float
    accuracy: float


def reliability(confidences: Sequence[float], accuracies: Sequence[float], bins: int = BINS) -> list[Bin]:
    """The answers in `bins` ranges of confidence of equal width, lowest first; a border belongs to the range below it. Empty ones have means 0."""
    values, right = np.asarray(confidences, dtype=np.float64), np.asarray(accuracies, dtype=np.float64)
    place = np.clip(np.ceil(values * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=v, minlength=bins) / np.maximum(count, 1) for v in (values, right)]
    return [Bin(int(n), float(c), float(a)) for n, c, a in zip(count, *sums, strict=True)]


def expected_calibration_error(confidences: Sequence[float], accuracies: Sequence[float], bins: int = BINS) -> float:
    """The mean distance between confidence and accuracy of the answers' bins (Guo et al. 2017), 0..1. Raises ValueError without answers."""
    if not confidences:
        raise ValueError("no answers to compare with their confidence.")
    found = reliability(confidences, accuracies, bins)
    return sum(b.count * abs(b.confidence - b.accuracy) for b in found) / len(confidences)
