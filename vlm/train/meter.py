"""What the losses and faults of the last steps come to: means over micro-batches, steps and ranks."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlm.data.batch import Batch
from vlm.train.distributed import Ranks


class Meter:
    """Means of the losses and scalars since the last report, kept on the device until then."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.sums: dict[str, Tensor] = {}
        self.filled: Counter[str] = Counter()
        self._step: dict[str, Tensor] = {}  # sums of the present step, until it is settled

    def add(self, losses: Mapping[str, Any], batch: Batch) -> None:
        """A micro-batch and what the task gave for it: by name a `Loss` (sum, count, scalars)."""
        for name, loss in losses.items():
            self._add(f"{name}/loss", loss.sum, loss.count)
            for scalar, (total, count) in loss.scalars.items():
                self._add(f"{name}/{scalar}", total, count)
        self.filled.update(batch.filled)

    def finite(self) -> Tensor:
        """() bool, on the device: whether the losses of the present step are."""
        return torch.stack([pair[0] for name, pair in self._step.items() if name.endswith("/loss")]).isfinite().all()

    def settle(self, taken: Tensor, norm: Tensor) -> None:
        """At the end of a step: it counts where `taken`. norm: of its gradient."""
        self._add("gradient_norm", norm, torch.ones_like(norm))
        for name, pair in self._step.items():
            counted = torch.where(taken, pair, torch.zeros_like(pair))
            self.sums[name] = self.sums[name] + counted if name in self.sums else counted
        self._step = {}

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        pair = torch.stack([total.detach().float(), count.detach().float()])
        self._step[name] = self._step[name] + pair if name in self._step else pair

    def take(self, ranks: Ranks) -> dict[str, float]:
        """The means over settled steps and ranks, their weighted total `loss`, and `filled`, the slots of bad samples, in all and by cause; nothing
        where every step was skipped. Then it starts anew.
        """
        names = list(self.sums)
        sums = ranks.sum(torch.stack([self.sums[name] for name in names])).cpu()
        values = {
            name: float(total / max(count, 1e-9)) for name, (total, count) in zip(names, sums.tolist(), strict=True)
        }
        if sums[names.index("gradient_norm"), 1] == 0:
            self.sums = {}
            return {}
        values["loss"] = sum(weight * values[f"{name}/loss"] for name, weight in self.weights.items())
        filled: Counter[str] = Counter()
        for part in ranks.gather([dict(self.filled)]):
            filled.update(part)
        values["filled"] = filled.total()
        values |= {f"filled/{cause}": count for cause, count in sorted(filled.items())}
        self.sums, self.filled = {}, Counter()
        return values

    def state(self) -> dict[str, Any]:
        """What this rank has counted since the last report."""
        return {"sums": {name: pair.cpu() for name, pair in self.sums.items()}, "filled": dict(self.filled)}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Takes back what `state` gave."""
        self.sums = {name: pair.to(device) for name, pair in state["sums"].items()}
        self.filled = Counter(state["filled"])
