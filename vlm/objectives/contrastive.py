"""Image-text contrastive objective (ITC; Radford et al. 2021, Li et al. 2021), in-batch over all ranks.

Letters: B images and T texts of this rank, W ranks, E width of the embeddings.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Features, Loss, Pass


class Contrastive:
    """Softmax cross-entropy both ways. All captions of an image are its positives; questions and slots of bad samples take no part."""

    scope: Literal["pair", "micro"] = "pair"

    def count(self, batch: Batch) -> Tensor:
        """Captions with weight; each direction is averaged over its own rows."""
        return comparable(batch).sum()

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:  # noqa: ARG002
        """None: the embeddings are there."""
        return ()

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:  # noqa: ARG002
        """Rows of this rank against the columns of all ranks, in fp32 (or better)."""
        text = features.texts["plain"]
        assert text.embedding is not None
        # One image row for each text, so that rows and columns mean the same on both sides.
        image_embedding = features.image.embedding.index_select(0, batch.texts.image)
        ids = batch.image_ids.index_select(0, batch.texts.image)
        valid = comparable(batch)
        all_image, all_text = gather(image_embedding), gather(text.embedding)
        all_ids, all_valid = gather(ids), gather(valid)
        to_text = contrastive_rows(image_embedding, all_text, ids, all_ids, all_valid, model.temperature)
        to_image = contrastive_rows(text.embedding, all_image, ids, all_ids, all_valid, model.temperature)
        total = torch.where(valid, (to_text.loss + to_image.loss) / 2, 0.0).sum()
        count = self.count(batch)
        right = ((to_text.right & valid).sum() + (to_image.right & valid).sum()) / 2
        return Loss(total, count, {"accuracy": (right, count)})


def comparable(batch: Batch) -> Tensor:
    """(T,) bool: texts that say what their image shows and have weight."""
    return batch.texts.describes & (batch.texts.weight > 0)


class _Rows(NamedTuple):
    """loss: (R,) of each row. right: (R,) bool, whether the row's best column is a positive."""

    loss: Tensor
    right: Tensor


def contrastive_rows(
    queries: Tensor, keys: Tensor, ids: Tensor, key_ids: Tensor, key_valid: Tensor, temperature: Tensor
) -> _Rows:
    """Cross-entropy of each row's softmax over the columns against its positives, equally weighted.

    queries: (R, E). keys: (C, E). ids: (R,), key_ids: (C,), equal for positives. key_valid: (C,), columns that take part.
    """
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ keys.T / temperature
        logits = logits.masked_fill(~key_valid, float("-inf"))
        log_probability = torch.log_softmax(logits, dim=1)
    positive = (ids[:, None] == key_ids[None, :]) & key_valid
    share = positive / positive.sum(1, keepdim=True).clamp(min=1)
    # A column of probability 0 is never a positive's with weight: 0 * -inf must not reach the sum.
    loss = -(share * log_probability.masked_fill(~positive, 0.0)).sum(1)
    right = positive.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
    return _Rows(loss, right)


def gather(local: Tensor) -> Tensor:
    """Rows of all ranks, in rank order; the backward pass sums the gradients of all ranks for the local rows."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local)
    return gathered


class _Gather(torch.autograd.Function):
    """all_gather whose gradient is exact: d(sum of all ranks' losses) / d(local rows)."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        ctx.rows = len(local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]
