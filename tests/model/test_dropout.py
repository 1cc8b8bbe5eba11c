"""Dropout by bytes has torch's distribution, up to the byte's rounding."""

import pytest
import torch

from vlm.model.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.001, 0.999])
def test_share_scale_and_gradient(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = torch.ones(1001, 203, dtype=dtype, requires_grad=True)
    result = Dropout(p).train()(states)
    kept = result != 0
    chance = 1 - min(max(round(256 * p), 1), 255) / 256
    deviation = (chance * (1 - chance) / states.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - chance) < 5 * deviation
    assert abs(chance - (1 - p)) <= 1 / 256
    assert torch.equal(result[kept], torch.full_like(result[kept], 1 / chance))
    assert result.dtype == dtype
    result.sum().backward()
    assert torch.equal(states.grad, result)
    # No pattern along either axis.
    assert (
        abs(float(kept.double().mean(0).std()) - (chance * (1 - chance) / 1001) ** 0.5)
        < 0.2 * (chance * (1 - chance) / 1001) ** 0.5 + 1e-9
    )


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    kept = Dropout(0.5).train()(torch.ones(1_000_000)).ne(0).double() - 0.5
    for distance in (1, 2, 4, 7, 8, 16):
        assert abs(float((kept[:-distance] * kept[distance:]).mean())) < 5 * 0.25 / 1000


def test_evaluation_and_zero_leave_everything() -> None:
    states = torch.randn(3, 5)
    assert torch.equal(Dropout(0.5).eval()(states), states)
    assert torch.equal(Dropout(0.0).train()(states), states)
    assert Dropout(0.3).train()(torch.empty(0, 4)).shape == (0, 4)


def test_the_seed_decides() -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        result: torch.Tensor = Dropout(0.3).train()(torch.ones(100))
        return result

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
