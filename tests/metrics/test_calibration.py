"""One temperature makes the mean confidence the accuracy, and the calibration error is that of its definition."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.metrics.calibration import calibrated, expected_calibration_error, fit_temperature, reliability

SHARES = st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0, 0.3, 0.6, 0.9, 1])), min_size=1, max_size=60)


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 5.0])
def test_after_calibration_the_mean_confidence_is_the_accuracy(sharpness: float) -> None:
    """Of a model that is too sure, as it should be, or too shy; the temperature that spoilt its probabilities is found."""
    generator = np.random.default_rng(0)
    true = generator.uniform(0.02, 0.98, 4000)
    said = (true**sharpness).tolist()
    right = (generator.uniform(size=4000) < true).astype(float).tolist()
    temperature = fit_temperature(said, right)
    confidences = [calibrated(p, temperature) for p in said]
    assert np.mean(confidences) == pytest.approx(np.mean(right), abs=1e-6)
    assert temperature == pytest.approx(sharpness, rel=0.06)
    assert expected_calibration_error(confidences, right) < 0.03
    if sharpness != 1.0:
        assert expected_calibration_error(said, right) > 0.1


def test_confidence_rises_with_probability_and_temperature() -> None:
    shares = np.linspace(0, 1, 21)
    for temperature in (0.1, 1.0, 7.0):
        found = [calibrated(p, temperature) for p in shares]
        assert found[0] == 0
        assert found[-1] == 1
        assert all(low < high for low, high in itertools.pairwise(found[1:]))
    assert [calibrated(p, 1.0) for p in shares] == pytest.approx(shares)
    assert calibrated(0.3, 2.0) > calibrated(0.3, 1.0) > calibrated(0.3, 0.5)
    assert calibrated(1.0000001, 3.0) == 1


@given(SHARES)
@settings(deadline=None)
def test_the_calibration_error_is_that_of_its_definition(pairs: list[tuple[float, float]]) -> None:
    confidences, right = [list(column) for column in zip(*pairs, strict=True)]
    expected = 0.0
    for number in range(10):
        low, high = number / 10, (number + 1) / 10
        inside = [(c, a) for c, a in pairs if low < c <= high or (number == 0 and c == 0)]
        if inside:
            distance = sum(a for _, a in inside) / len(inside) - sum(c for c, _ in inside) / len(inside)
            expected += len(inside) / len(pairs) * abs(distance)
    near_a_border = any(abs(c * 10 - round(c * 10)) < 1e-9 for c in confidences)
    if not near_a_border:
        assert expected_calibration_error(confidences, right) == pytest.approx(expected, abs=1e-12)
    assert sum(b.count for b in reliability(confidences, right)) == len(pairs)


def test_a_border_of_the_bins_belongs_to_the_range_below_it() -> None:
    """As in its definition: (0, 1/4], (1/4, 1/2], ..., and 0 in the first."""
    found = reliability([0.0, 0.25, 0.5, 0.5, 0.75, 1.0], [0, 0.3, 0.6, 1, 0.9, 1], bins=4)
    assert [(b.count, b.confidence) for b in found] == [(2, 0.125), (2, 0.5), (1, 0.75), (1, 1.0)]
    assert [b.accuracy for b in found] == pytest.approx([0.15, 0.8, 0.9, 1])


def test_what_no_temperature_can_reach_is_refused() -> None:
    for said, right in (([0.5, 0.6], [1, 1]), ([0.5, 0.6], [0, 0]), ([1.0, 1.0, 0.2], [0.3, 0, 0]), ([0.0], [0.5])):
        with pytest.raises(ValueError, match="outside of what the mean confidence can be"):
            fit_temperature(said, right)
    with pytest.raises(ValueError, match="0 probabilities"):
        fit_temperature([], [])
    with pytest.raises(ValueError, match="no answers"):
        expected_calibration_error([], [])
