"""Exponentially averaged weights, which are evaluated and saved in place of the last ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vlm.train.sharding import Sharding, local


class Averaging:
    """Keeps averaged weights of `model` beside it; with decay 0 it does nothing.

    The decay grows as (1 + n) / (10 + n) up to `decay`, n steps having been averaged, so that the random start is soon forgotten. sharding: of the
    model; its pieces are averaged where it is in pieces.
    """

    def __init__(self, model: nn.Module, decay: float, sharding: Sharding | None = None) -> None:
        self.decay, self._sharding = decay, sharding
        device = next(model.parameters()).device
        self.averaged: AveragedModel | None = None
        if decay > 0:
            self.averaged = AveragedModel(self._whole(model), device, use_buffers=True)
            if sharding is not None:
                sharding.share(self.averaged.module, like=model)

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
                local(averaged).lerp_(local(current[name]), weight.to(averaged.dtype))
            else:
                averaged.copy_(torch.where(taken, current[name], averaged))
        n += taken

    def best(self, model: nn.Module) -> nn.Module:
        """The module to evaluate and save, in one piece: the averaged one if there is one. Every rank must ask."""
        return self._whole(model if self.averaged is None else self.averaged.module)

    def _whole(self, model: nn.Module) -> nn.Module:
        return model if self._sharding is None else self._sharding.whole(model)

    @contextmanager
    def applied(self, owner: nn.Module) -> Iterator[None]:
        """`owner.model` is the averaged model, in one piece, inside the block."""
        model = owner.model
        assert isinstance(model, nn.Module)
        best = self.best(model)
        kept_on = next(best.parameters()).device
        owner.model = best.to(next(model.parameters()).device)
        try:
            yield
        finally:
            owner.model = model
            best.to(kept_on)
