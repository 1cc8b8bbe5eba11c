"""Bootstrap intervals: they hold the truth as often as they say."""

import numpy as np
import pytest

from vlm.metrics.interval import bootstrap, bootstrap_parts


def test_it_holds_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        low, high = bootstrap(generator.normal(3.0, 1.0, 60).tolist(), level=0.9, resamples=300)
        held += low <= 3.0 <= high
    assert 165 <= held <= 195  # 180 expected, standard deviation 4.2; small samples hold somewhat less


def test_its_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(2).normal(0, 2, 900).tolist()
    low, high = bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 30, rel=0.1)
    assert (low, high) == bootstrap(values)


def test_values_of_one_group_are_drawn_together() -> None:
    """Ten copies of each value say no more than one."""
    values = np.random.default_rng(3).normal(0, 1, 50)
    alone = bootstrap(values.tolist())
    together = bootstrap(np.repeat(values, 10).tolist(), np.repeat(np.arange(50), 10).tolist())
    assert together == pytest.approx(alone)
    low, high = bootstrap(np.repeat(values, 10).tolist())
    assert high - low < 0.5 * (alone[1] - alone[0])


def test_parts_are_drawn_from_the_same_resamples() -> None:
    """One part is as `bootstrap`; a part in every image is as if it were alone; of rare parts the resamples without them are left out."""
    generator = np.random.default_rng(4)
    values, images = generator.normal(0, 1, 90).tolist(), np.repeat(np.arange(30), 3).tolist()
    assert bootstrap_parts(values, ["all"] * 90, images)["all"] == bootstrap(values, images)
    found = bootstrap_parts(values, ["a", "b", "b"] * 29 + ["a", "a", "rare"], images)
    assert list(found) == ["a", "b", "rare"]
    alone = bootstrap([*values[0:87:3], *values[87:89]], [*range(29), 29, 29])
    assert found["a"] == pytest.approx(alone)
    assert found["rare"] == pytest.approx((values[-1], values[-1]))


def test_without_values() -> None:
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])
