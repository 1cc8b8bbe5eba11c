"""Image-text contrastive objective (ITC; Radford et al. 2021, Li et al. 2021), in-batch over all ranks, or against a momentum teacher's features.

Letters: B images and T texts of this rank, W ranks, C columns (keys), E width of the embeddings.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Features, Loss, Pass, Taught
from vlm.objectives.pairs import Pairs, comparable, pairs


class Contrastive:
    """Softmax cross-entropy both ways. All captions of an image are its positives; questions and slots of bad samples take no part.

    With a teacher the columns are its features (and its queue), and the targets alpha * softmax(teacher's logits) + (1 - alpha) * positives.
    """

    scope: Literal["pair", "micro"] = "pair"

    def count(self, batch: Batch) -> Tensor:
        """Captions with weight; each direction is averaged over its own rows."""
        return comparable(batch).sum()

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:  # noqa: ARG002
        """None: the embeddings are there."""
        return ()

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:  # noqa: ARG002
        """Of the batch's pairs."""
        return self.compare(
            model, pairs(features.image.embedding, features.texts["plain"].embedding, batch), features.teacher
        )

    def compare(self, model: VisionLanguageModel, own: Pairs, taught: Taught | None) -> Loss:
        """Rows of this rank against the columns of all ranks or of the teacher, in fp32 (or better)."""
        temperature = model.temperature
        blocks = [own.gathered()] if taught is None else taught.keys
        ids, valid = torch.cat([block.ids for block in blocks]), torch.cat([block.valid for block in blocks])
        images, texts = [block.image for block in blocks], [block.text for block in blocks]
        to_text_logits, to_image_logits = (
            similarity(own.image, texts, temperature),
            similarity(own.text, images, temperature),
        )
        soft_text = soft_image = alpha = None
        if taught is not None and taught.pairs is not None:
            alpha, fixed = taught.alpha, temperature.detach()
            soft_text = similarity(taught.pairs.image, texts, fixed)
            soft_image = similarity(taught.pairs.text, images, fixed)
        to_text = contrastive_rows(to_text_logits, own.ids, ids, valid, soft_text, alpha)
        to_image = contrastive_rows(to_image_logits, own.ids, ids, valid, soft_image, alpha)
        total = torch.where(own.valid, (to_text.loss + to_image.loss) / 2, 0.0).sum()
        count = own.valid.sum()
        right = ((to_text.right & own.valid).sum() + (to_image.right & own.valid).sum()) / 2
        return Loss(total, count, {"accuracy": (right, count)})


def similarity(queries: Tensor, blocks: Sequence[Tensor], temperature: Tensor) -> Tensor:
    """(R, C) logits. queries: (R, E). blocks: of keys (., E), C in all; a queue is read where it lies, not copied."""
    with torch.autocast(queries.device.type, enabled=False):
        return torch.cat([queries @ keys.T for keys in blocks], dim=1) / temperature


class _Rows(NamedTuple):
    """loss: (R,) of each row. right: (R,) bool, whether the row's best column is a positive."""

    loss: Tensor
    right: Tensor


def contrastive_rows(
    logits: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    key_valid: Tensor,
    soft: Tensor | None = None,
    alpha: Tensor | None = None,
) -> _Rows:
    """Cross-entropy of each row's softmax over the columns against its positives, equally weighted, mixed with softmax(soft) by `alpha`.

    logits, soft: (R, C). ids: (R,), key_ids: (C,), equal for positives. key_valid: (C,), columns that take part. alpha: ().
    """
    absent = ~key_valid
    logits = logits.masked_fill(absent, float("-inf"))
    positive = (ids[:, None] == key_ids[None, :]) & key_valid
    target = positive / positive.sum(1, keepdim=True).clamp(min=1).to(logits.dtype)
    if soft is not None and alpha is not None:
        taught = torch.softmax(soft.masked_fill(absent, float("-inf")), dim=1)
        target = target + alpha.to(target.dtype) * (taught - target)
    # An absent column has target 0: 0 * -inf must not reach the sum.
    log_probability = torch.log_softmax(logits, dim=1).masked_fill(absent, 0.0)
    loss = -(target * log_probability).sum(1)
    right = positive.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
    return _Rows(loss, right)
