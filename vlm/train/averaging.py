"""Exponentially averaged weights, which are evaluated and saved in place of the last ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def _warmed(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """The decay grows as (1 + n) / (10 + n) up to `decay`, so that the random start is soon forgotten."""

    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        n = int(count)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        floating = [i for i, tensor in enumerate(averaged) if tensor.is_floating_point()]
        if floating:  # the caller groups by type: counters come apart
            torch._foreach_lerp_([averaged[i] for i in floating], [current[i] for i in floating], weight)
        for i, tensor in enumerate(averaged):
            if not tensor.is_floating_point():
                tensor.copy_(current[i])

    return update


class Averaging:
    """Keeps averaged weights of `model` beside it; with decay 0 it does nothing."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.averaged = AveragedModel(model, multi_avg_fn=_warmed(decay), use_buffers=True) if decay > 0 else None

    def update(self, model: nn.Module) -> None:
        """After each optimizer step."""
        if self.averaged is not None:
            self.averaged.update_parameters(model)

    def best(self, model: nn.Module) -> nn.Module:
        """The module to evaluate and save: the averaged one if there is one."""
        return model if self.averaged is None else self.averaged.module

    @contextmanager
    def applied(self, owner: nn.Module) -> Iterator[None]:
        """`owner.model` is the averaged model inside the block."""
        model = owner.model
        assert isinstance(model, nn.Module)
        owner.model = self.best(model)
        try:
            yield
        finally:
            owner.model = model
