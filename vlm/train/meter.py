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

    def add(self, losses: Mapping[str, Any], batch: Batch) -> None:
        """A micro-batch and what the task gave for it: by name a `Loss` (sum, count, scalars)."""
        for name, loss in losses.items():
            self._add(f"{name}/loss", loss.sum, loss.count)
            for scalar, (total, count) in loss.scalars.items():
                self._add(f"{name}/{scalar}", total, count)
        self.filled.update(batch.filled)

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        pair = torch.stack([total.detach().float(), count.detach().float()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def take(self, ranks: Ranks) -> dict[str, float]:
        """The means over ranks, their weighted total `loss`, and `filled`, the slots of bad samples, in all and by cause; then starts anew."""
        names = list(self.sums)
        sums = ranks.sum(torch.stack([self.sums[name] for name in names])).cpu()
        values = {
            name: float(total / max(count, 1e-9)) for name, (total, count) in zip(names, sums.tolist(), strict=True)
        }
        values["loss"] = sum(weight * values[f"{name}/loss"] for name, weight in self.weights.items())
        filled: Counter[str] = Counter()
        for part in ranks.gather([dict(self.filled)]):
            filled.update(part)
        values["filled"] = filled.total()
        values |= {f"filled/{cause}": count for cause, count in sorted(filled.items())}
        self.sums, self.filled = {}, Counter()
        return values
