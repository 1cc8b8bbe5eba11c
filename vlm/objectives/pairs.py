"""Image-text pairs as embeddings, and their exchange between ranks.

Letters: B images and T texts of this rank, N pairs, E width of the embeddings.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vlm.data.batch import Batch


class Pairs(NamedTuple):
    """One pair for each text. image, text: (N, E) unit. ids: (N,) int64, equal for texts of one image. valid: (N,) bool, pairs that take part."""

    image: Tensor
    text: Tensor
    ids: Tensor
    valid: Tensor

    def gathered(self) -> "Pairs":
        """Those of all ranks, in rank order; gradients reach the rank that a row came from."""
        return Pairs(*(gather(part) for part in self))

    def detached(self) -> "Pairs":
        """The same without gradient."""
        return Pairs(self.image.detach(), self.text.detach(), self.ids, self.valid)


def pairs(image: Tensor, text: Tensor | None, batch: Batch) -> Pairs:
    """The batch's pairs, one image row for each text, so that rows and columns mean the same on both sides. image: (B, E). text: (T, E)."""
    assert text is not None
    own = batch.texts.image
    return Pairs(image.index_select(0, own), text, batch.image_ids.index_select(0, own), comparable(batch))


def comparable(batch: Batch) -> Tensor:
    """(T,) bool: texts that say what their image shows and have weight."""
    return batch.texts.describes & (batch.texts.weight > 0)


def rank() -> int:
    """This process's place among the ranks."""
    return dist.get_rank() if world() > 1 else 0


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def largest(value: int) -> int:
    """The largest of all ranks' values. The processors tell each other: no device is waited for."""
    if world() == 1:
        return value
    shared = torch.tensor(value)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def gather(local: Tensor) -> Tensor:
    """Rows of all ranks, in rank order; the backward pass sums the gradients of all ranks for the local rows."""
    if world() == 1:
        return local
    gathered: Tensor = _Gather.apply(local)
    return gathered


class _Gather(torch.autograd.Function):
    """all_gather whose gradient is exact: d(sum of all ranks' losses) / d(local rows)."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, local.contiguous())
        ctx.rows = len(local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        given = gradients[0].dtype
        dtype = torch.promote_types(given, torch.float32)  # many ranks' halves would not add up
        # a copy, as others may have been handed the same gradient
        gradient = gradients[0].to(dtype, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows].to(given)
