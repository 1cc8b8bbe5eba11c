"""The numbers that a step is computed in: fp32, or autocast to bf16 or fp16; fp16 with a scaled loss, as small gradients would otherwise be 0."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from vlm.config import Config
from vlm.train.distributed import Ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOWEST_SCALE = 1.0
"""Where the scale stops falling: a gradient that overflows unscaled will not be mended by a smaller scale."""


def fastest(device: torch.device) -> str:
    """The precision that the device has instructions for: bf16 where it has, else fp16 on a GPU and fp32 on a CPU.

    A CPU without them computes bf16 by conversions, some 15 times slower than fp32 where it was measured (benchmarks/cpu_training.py).
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # x86's names alone: what other processors make of bf16 was not measured
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if known.get("amx_bf16") or known.get("avx512_bf16") else "fp32"


def settled(config: Config, ranks: Ranks) -> Config:
    """The settings with a precision in place of "auto": the device's fastest, fp32 where ranks differ in it. Every rank must ask."""
    if config.train.precision != "auto":
        return config
    names = set(ranks.gather([fastest(ranks.device)]))
    return replace(config, train=replace(config.train, precision=names.pop() if len(names) == 1 else "fp32"))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """What forward passes run in: matrix products and convolutions in half precision, or everything as it is."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


class _Scaler(GradScaler):
    """torch's, which is told whether the step was made: another rank's loss, or a shard of the gradient elsewhere, may have decided."""

    def settle(self, optimizer: torch.optim.Optimizer, taken: Tensor) -> None:
        for found in self._found_inf_per_device(optimizer).values():
            found.copy_(~taken)
        self.update()
        scale = self._get_scale_async()
        assert scale is not None
        scale.clamp_(min=LOWEST_SCALE)


class Precision:
    """The precision of one run: fp32, bf16 or fp16. With fp16 the loss is scaled, the gradient unscaled before it is clipped, and the scale halved
    after a step whose gradient overflowed, doubled after 2000 others. Nothing waits for the device.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.scaler = _Scaler(device.type) if name == "fp16" else None

    def autocast(self) -> torch.autocast:
        """What forward passes run in."""
        return autocast(self.name, self.device)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` of."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """After the last backward pass of a step, once: divides the gradients by the scale.

        Returns () bool on the device: whether a smaller scale may mend gradients that are not finite.
        """
        if self.scaler is None:
            return torch.zeros((), dtype=torch.bool, device=self.device)
        self.scaler.unscale_(optimizer)
        scale = self.scaler._get_scale_async()
        assert scale is not None
        return scale > LOWEST_SCALE

    def settle(self, optimizer: torch.optim.Optimizer, taken: Tensor) -> None:
        """At the end of a step. taken: () bool, whether it was made, the same on all ranks."""
        if self.scaler is not None:
            self.scaler.settle(optimizer, taken)

    def state(self) -> dict[str, Any]:
        """What going on needs of it: the scale and how long it has been good. Waits for the device."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave; a state without a scale (of a run in another precision) leaves it at its start."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
