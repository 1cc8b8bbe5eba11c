"""Which patches are hidden: the right number of them, in whole squares, all alike, and by key."""

from collections import Counter

import pytest
import torch

from vlm.data.hiding import PatchHiding, patch_hiding
from vlm.errors import ConfigError


@pytest.mark.parametrize(
    ("grid", "unit", "share", "units"), [((8, 8), 2, 0.6, 10), ((6, 4), 1, 0.5, 12), ((1, 2), 1, 0.9, 1)]
)
def test_hidden_squares(grid: tuple[int, int], unit: int, share: float, units: int) -> None:
    """SimMIM's number of them in every image, whole, each as often as the others, and the generator's seed decides."""
    hiding = PatchHiding(grid, unit, share)
    assert hiding.patches == units * unit**2
    times = torch.zeros(grid[0] * grid[1])
    for seed in range(400):
        drawn = hiding.draw(torch.Generator().manual_seed(seed))
        assert torch.equal(drawn, hiding.draw(torch.Generator().manual_seed(seed)))
        assert drawn.dtype == torch.int64
        assert len(drawn) == hiding.patches == len(set(drawn.tolist()))
        assert drawn.tolist() == sorted(drawn.tolist())
        times[drawn] += 1
        squares = Counter((n // grid[1] // unit, n % grid[1] // unit) for n in drawn.tolist())
        assert set(squares.values()) == {unit**2}
    expected = 400 * hiding.patches / len(times)
    assert ((times - expected).abs() < 5 * (expected * (1 - expected / 400)) ** 0.5).all()


def test_squares_that_do_not_fill_the_image() -> None:
    assert patch_hiding((14, 14), 16, 32, 0.6) == PatchHiding((14, 14), 2, 0.6)
    with pytest.raises(
        ConfigError, match=r"hidden_unit=32 does not cut 224x224 px .* patches of 14 px.*use 14, 28, 56 or 112\."
    ):
        patch_hiding((16, 16), 14, 32, 0.6)
    with pytest.raises(ConfigError, match="the image is one patch of 32 px"):
        patch_hiding((1, 1), 32, 32, 0.6)
