"""The exchange between ranks: how gradients come back. Its values: `test_distributed.py`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vlm.objectives import pairs

Among = Callable[[int, Callable[[Tensor], Any]], None]


@pytest.fixture
def among(monkeypatch: pytest.MonkeyPatch) -> Among:
    """among(ranks, others): this process is the first of so many, and `others` does to a tensor what adding up theirs to it would do."""

    def pretend(ranks: int, others: Callable[[Tensor], Any]) -> None:
        def all_gather(parts: list[Tensor], own: Tensor) -> None:
            for part in parts:
                part.copy_(own)

        monkeypatch.setattr(pairs, "world", lambda: ranks)
        monkeypatch.setattr(dist, "get_rank", lambda: 0)
        monkeypatch.setattr(dist, "all_gather", all_gather)
        monkeypatch.setattr(dist, "all_reduce", others)

    return pretend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_add_up(among: Among, dtype: torch.dtype) -> None:
    """Four ranks' gradients of a quarter of the smallest step from 1: added to 1 one by one, each would be lost."""
    step = torch.finfo(dtype).eps

    def others(gradient: Tensor) -> None:
        for _ in range(4):
            gradient += step / 4

    among(5, others)
    local = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    gathered = pairs.gather(local)
    assert gathered.shape == (10, 3)
    gathered.backward(torch.ones_like(gathered))
    assert local.grad is not None
    assert local.grad.dtype == dtype
    assert (local.grad == 1 + step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_ranks_gradients_reach_nothing_but_what_was_gathered(among: Among, dtype: torch.dtype) -> None:
    among(2, lambda gradient: gradient.add_(10))
    local = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    beside = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
    together = pairs.gather(local) + beside  # both are handed one gradient
    (found, others) = torch.autograd.grad(together, [local, beside], torch.ones_like(together))
    assert (found == 11).all()
    assert (others == 1).all()
