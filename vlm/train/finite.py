"""Steps whose loss or gradient is not finite: decided on the device, skipped, counted and named; too many in a row end the run."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlm.data.batch import Batch
from vlm.errors import UserError
from vlm.train.distributed import Ranks
from vlm.train.report import JsonLines, say
from vlm.train.sharding import local

HINT = "Try a lower optimizer.lr, a longer optimizer.warmup_steps, or train.precision fp32."


class FiniteSteps:
    """Lets an optimizer step happen, or nothing at all: neither weights nor the optimizer's moments, batch-norm statistics, averages, teacher and
    queue change in a step that is skipped. Only the position and the random numbers go on.

    The decision stays on the device, where everything that follows a step reads it; this process reads several of them together, because each
    reading waits for the device. The optimizer is one of torch's fused ones, which know `found_inf`. limit: steps in a row that end the run.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, limit: int) -> None:
        self.model, self.optimizer, self.ranks, self.limit = model, optimizer, ranks, limit
        self.skipped = 0  # in the whole run, as far as it has been read
        self._in_a_row = 0
        self._statistics: list[tuple[Tensor, Tensor]] = []  # batch-norm buffers, with their values before the step
        self._unread: list[
            tuple[int, list[str], Tensor]
        ] = []  # steps, what they were of, whether they were made and, if not, count

    def begin(self) -> None:
        """Before the first forward pass of a step: remembers what it will change."""
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.training]
        self._statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    def decide(self, step: int, finite: Tensor, micro: Sequence[Batch], mendable: Tensor | None = None) -> Tensor:
        """Before the optimizer's step: () bool, whether it is made, the same on all ranks.

        step: its number. finite: () bool, whether this rank's losses and gradients are. micro: what they are of. mendable: () bool, whether a
        smaller scale of the loss (`vlm.train.precision`) may make them so: a step that is skipped for that alone does not count as one of several.
        """
        mendable = torch.zeros_like(finite) if mendable is None else mendable
        found = self.ranks.sum(torch.stack([~finite, ~finite & ~mendable]).float()) == 0
        taken = found[0]
        self.optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
        for buffer, before in self._statistics:
            buffer.copy_(torch.where(taken, buffer, before))
        self._unread.append((step, [key for batch in micro for key in batch.keys], found))
        return taken

    def check(self, log: JsonLines | None, save: Callable[[], object], now: bool = True) -> None:
        """Writes a line for every skipped step since the last reading. now: as something is to be told or written; otherwise only when it is time.

        Raises:
            UserError: `limit` steps in a row were skipped; `save` was called, and writes the state of the last step that was made.
        """
        # On a CPU nothing waits; on a GPU a run that has gone wrong ends at most as many steps too late.
        due = self.ranks.device.type == "cpu" or len(self._unread) >= self.limit
        if not self._unread or not (now or due):
            return
        unread, self._unread = self._unread, []
        ended: tuple[int, list[str]] | None = None
        for (step, keys, _), (taken, passes) in zip(
            unread, torch.stack([found for *_, found in unread]).tolist(), strict=True
        ):
            if taken:
                self._in_a_row = 0
                continue
            self.skipped += 1
            if passes:
                self._overflowed(step, log)
                continue
            self._in_a_row += 1
            keys = self.ranks.gather(keys)  # every rank comes here, as every rank has decided the same
            if log is not None:
                log.write(kind="skipped", step=step, keys=keys)
            say(f"step {step}: the loss or its gradient is not a finite number; skipped (its images: log.jsonl)")
            if self._in_a_row >= self.limit:
                ended = ended or (step, keys)
        if ended is not None:
            self._in_a_row = 0
            save()
            step, keys = ended
            raise UserError(
                f"step {step}: the loss or its gradient is not a finite number, like those of the steps before it, train.max_skipped={self.limit} "
                f"in all; `latest` holds the last good state, log.jsonl the keys of the images (at last {', '.join(keys[:3])}). {HINT}"
            )

    def _overflowed(self, step: int, log: JsonLines | None) -> None:
        if log is not None:
            log.write(kind="skipped", step=step, cause="overflow")
        say(f"step {step}: the scaled gradient overflowed fp16; skipped, the scale is halved")

    def state(self) -> dict[str, Any]:
        """What going on needs of it, once everything is read."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]


def weights_are_finite(model: nn.Module, ranks: Ranks) -> bool:
    """Whether all parameters are, on every rank; waits for the device."""
    here = bool(torch.stack([local(parameter).isfinite().all() for parameter in model.parameters()]).all())
    return not ranks.any(not here)
