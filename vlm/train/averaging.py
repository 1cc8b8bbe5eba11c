"""Exponentially averaged weights, which are evaluated and saved in place of the last ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Averaging:
    """Keeps averaged weights of `model` beside it; with decay 0 it does nothing.

    The decay grows as (1 + n) / (10 + n) up to `decay`, n steps having been averaged, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        device = next(model.parameters()).device
        self.averaged = AveragedModel(model, device, use_buffers=True) if decay > 0 else None

    @torch.no_grad()
    def update(self, model: nn.Module, taken: Tensor | None = None) -> None:
        """After each optimizer step; nothing happens where that was not `taken`, a () bool on the device. Nothing waits for the device, as
        `AveragedModel.update_parameters` would.
        """
        if self.averaged is None:
            return
        n = self.averaged.n_averaged
        taken = torch.ones_like(n, dtype=torch.bool) if taken is None else taken
        keeps = ((1 + n.double()) / (10 + n)).clamp(max=self.decay)
        weight = torch.where(n == 0, 1.0, 1 - keeps) * taken
        current = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, averaged in (*self.averaged.module.named_parameters(), *self.averaged.module.named_buffers()):
            if averaged.is_floating_point():
                averaged.lerp_(current[name], weight.to(averaged.dtype))
            else:
                averaged.copy_(torch.where(taken, current[name], averaged))
        n += taken

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
