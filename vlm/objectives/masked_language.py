"""Masked language modelling given the image (MLM; Devlin et al. 2019, Li et al. 2021).

Letters: T texts, L tokens, D width, M hidden tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.data.batch import Batch, Masked
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Features, Loss, Pass, exact


class MaskedLanguage:
    """Predicts the hidden tokens; the vocabulary head runs on their positions only.

    With a teacher its predictions are part of the targets: alpha * softmax(teacher's logits) + (1 - alpha) * the token hidden.
    """

    scope: Literal["pair", "micro"] = "micro"

    def count(self, batch: Batch) -> Tensor:
        """Hidden tokens of texts with weight."""
        return (self._weight(batch, _masked(batch)) > 0).sum()

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:  # noqa: ARG002
        """Every text with its tokens hidden, and its own image."""
        rows = torch.arange(len(_masked(batch).ids), device=batch.texts.ids.device)
        return [Pass(rows, batch.texts.image, view="masked")]

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:
        """Cross-entropy at the hidden tokens, summed; a batch without any gives a 0 that still reaches every parameter, with gradient 0."""
        masked = _masked(batch)
        states = outputs[0].flatten(0, 1).index_select(0, masked.positions)
        logits = exact(model.masked_language_logits(states))
        used = self._weight(batch, masked) > 0
        losses = F.cross_entropy(logits, masked.labels, reduction="none")
        taught = features.teacher
        if taught is not None and taught.words is not None:
            soft = F.cross_entropy(logits, torch.softmax(exact(taught.words), dim=1), reduction="none")
            losses = losses + taught.alpha.to(losses.dtype) * (soft - losses)
        total = torch.where(used, losses, 0.0).sum()
        right = ((logits.argmax(1) == masked.labels) & used).sum()
        count = used.sum()
        return Loss(total, count, {"accuracy": (right, count)})

    @staticmethod
    def _weight(batch: Batch, masked: Masked) -> Tensor:
        rows = torch.div(masked.positions, masked.ids.shape[1], rounding_mode="floor")
        return batch.texts.weight.index_select(0, rows)


def _masked(batch: Batch) -> Masked:
    if batch.masked is None:
        raise ValueError(
            "the batch has no masked texts; the loader draws them when objectives.masked_language is above 0."
        )
    return batch.masked
