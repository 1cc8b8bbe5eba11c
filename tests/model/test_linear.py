"""A few rows on a CPU are multiplied the other way round: the same numbers, and only where nothing else depends on how."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.model import linear as module
from vlm.model.linear import FEW, Linear, linear


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each of torch's own products from here on."""
    calls: list[int] = []

    def counted(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(states.numel() // states.shape[-1])
        return F.linear(states, weight, bias)

    monkeypatch.setattr(module, "F", SimpleNamespace(linear=counted))
    return calls


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1), (1, 3), (2, 2), (5,), (6,), (0,), (0, 3), (2, 0), ()])
@pytest.mark.parametrize("biased", [True, False])
def test_the_numbers_are_torchs(shape: tuple[int, ...], biased: bool) -> None:
    layer, states = Linear(64, 48, bias=biased), torch.randn(*shape, 64)
    with torch.no_grad():
        found, expected = layer(states), F.linear(states, layer.weight, layer.bias)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_states_of_any_layout_are_taken() -> None:
    states, weight = torch.randn(64, 3).t(), torch.randn(48, 64)
    with torch.no_grad():
        torch.testing.assert_close(linear(states, weight, None), states @ weight.t(), rtol=1e-5, atol=1e-5)


def test_a_few_rows_are_turned_round_and_others_are_not(plain: list[int]) -> None:
    layer = Linear(16, 8)
    with torch.no_grad():
        for rows in range(1, 9):
            layer(torch.randn(rows, 16))
    assert plain == [rows for rows in range(1, 9) if rows not in FEW]
    assert 3 in FEW, "a beam search of one image, as papers report it"


def test_training_other_precisions_and_autocast_keep_torchs_product(plain: list[int]) -> None:
    layer, states = Linear(16, 8), torch.randn(3, 16)
    layer(states).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer.double()(states.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(states).dtype == torch.bfloat16
    assert plain == [3, 3, 3]


def test_weights_of_another_kind_keep_torchs_product(plain: list[int]) -> None:
    """int8 weights are a tensor class with its own product."""

    class Other(Tensor):
        pass

    with torch.no_grad():
        linear(torch.randn(3, 16), torch.randn(8, 16).as_subclass(Other), None)
    assert plain == [3]


def test_an_exported_graph_serves_any_number_of_rows() -> None:
    layer = Linear(16, 8).eval()
    rows = torch.export.Dim("rows", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(3, 16),), dynamic_shapes=({0: rows},)).module()
        for count in (1, 3, 20):
            states = torch.randn(count, 16)
            torch.testing.assert_close(exported(states), layer(states))
