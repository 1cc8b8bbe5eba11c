"""A few rows on a CPU are multiplied the other way round: the same numbers, and only where nothing else depends on how."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.model import linear as module
from vlm.model.linear import FEW, LARGE, Linear, linear


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


@pytest.mark.parametrize("outputs", [768, 30_522, 30_524, 262])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_row_of_a_large_weight_gives_torchs_numbers(
    outputs: int, biased: bool, shape: tuple[int, ...], plain: list[int]
) -> None:
    """Vocabularies of BERT and BLIP among them, and outputs that have two blocks of which each is a prime number."""
    layer, states = Linear(512, outputs, bias=biased), torch.randn(*shape, 512)
    with torch.no_grad():
        found, expected = layer(states), F.linear(states, layer.weight, layer.bias)
    assert not plain
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_states_and_weights_of_any_layout_are_taken(rows: int) -> None:
    states, weight = torch.randn(512, rows).t(), torch.randn(512, 384).t()
    with torch.no_grad():
        torch.testing.assert_close(linear(states, weight, None), states @ weight.t(), rtol=1e-5, atol=1e-4)


def test_a_few_rows_are_multiplied_our_way_and_others_are_not(plain: list[int]) -> None:
    layer = Linear(LARGE // 96, 96)
    with torch.no_grad():
        for rows in range(1, 9):
            layer(torch.randn(rows, LARGE // 96))
    assert plain == [1, *(rows for rows in range(1, 9) if rows not in FEW)], "just too small for one row in blocks"
    assert 3 in FEW, "a beam search of one image, as papers report it"


def test_one_row_whose_outputs_cannot_be_divided_keeps_torchs_product(plain: list[int]) -> None:
    with torch.no_grad():
        linear(torch.randn(1, 512), torch.randn(521, 512), None)
    assert plain == [1]


def test_training_other_precisions_and_autocast_keep_torchs_product(plain: list[int]) -> None:
    layer = Linear(512, 768)
    for rows in (1, 3):
        states = torch.randn(rows, 512)
        layer.float()(states).sum().backward()
        assert layer.weight.grad is not None
        with torch.no_grad():
            layer.double()(states.double())
            with torch.autocast("cpu", torch.bfloat16):
                assert layer.float()(states).dtype == torch.bfloat16
    assert plain == [1, 1, 1, 3, 3, 3]


def test_weights_of_another_kind_keep_torchs_product(plain: list[int]) -> None:
    """int8 weights are a tensor class with its own product."""

    class Other(Tensor):
        pass

    with torch.no_grad():
        for rows in (1, 3):
            linear(torch.randn(rows, 512), torch.randn(768, 512).as_subclass(Other), None)
    assert plain == [1, 3]


def test_an_exported_graph_serves_any_number_of_rows() -> None:
    layer = Linear(512, 768).eval()
    rows = torch.export.Dim("rows", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(3, 512),), dynamic_shapes=({0: rows},)).module()
        for count in (1, 3, 20):
            states = torch.randn(count, 512)
            torch.testing.assert_close(exported(states), layer(states), rtol=1e-5, atol=1e-5)


def test_it_compiles_in_one_graph_without_blocks() -> None:
    """Blocks would be slower there, see `linear`."""
    layer, graphs = Linear(512, 768).eval(), []

    def kept(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=kept)
    with torch.no_grad():
        for rows in (1, 3):
            states = torch.randn(rows, 512)
            torch.testing.assert_close(compiled(states), layer(states), rtol=1e-5, atol=1e-5)
    assert ["baddbmm" in code for code in graphs] == [False, False]
    assert ["addmm" in code for code in graphs] == [False, True]
