"""Image-text matching with in-batch hard negatives (ITM; Li et al. 2021, ALBEF section 3.2).

Letters: B images, T texts (one for each image in training), L tokens, D width.

The family's notorious crash, `multinomial: sum of probabilities <= 0`, cannot happen here: the softmax runs in fp32 over the eligible columns only, so
each row with a candidate sums to 1 whatever the logits, and a row without one points at itself with weight 0. Nothing waits for the device.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Features, Loss, Pass


class Matching:
    """Three pairs for each text: its own image, a hard negative image, and its image with a hard negative text."""

    scope: Literal["pair", "micro"] = "micro"

    def count(self, batch: Batch) -> Tensor:
        """One positive a weighted text; two negatives where another image is at hand."""
        usable, eligible = eligibility(batch)
        return usable.sum() + 2 * (usable & eligible.any(1)).sum()

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:
        """Positive, negative images, negative texts: in this order."""
        text = features.texts["plain"]
        assert text.embedding is not None
        own = batch.texts.image
        _, eligible = eligibility(batch)
        with torch.no_grad(), torch.autocast(own.device.type, enabled=False):
            image = features.image.embedding.index_select(0, own)
            similarity = image @ text.embedding.T / model.temperature
            negative_text = sample_negatives(similarity, eligible)
            negative_image = own[sample_negatives(similarity.T, eligible)]
        rows = torch.arange(len(own), device=own.device)
        return [Pass(rows, own), Pass(rows, negative_image), Pass(negative_text, own)]

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:
        """Cross-entropy over match / no match, summed."""
        usable, eligible = eligibility(batch)
        negatives = usable & eligible.any(1)
        weight = torch.cat([usable, negatives, negatives])
        logits = model.matching_logits(torch.cat([states[:, :1] for states in outputs])).float()
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(usable)] = 1
        losses = F.cross_entropy(logits, labels, reduction="none")
        total = torch.where(weight, losses, losses * 0.0).sum()
        right = ((logits.argmax(1) == labels) & weight).sum()
        count = weight.sum()
        return Loss(total, count, {"accuracy": (right, count)})


def eligibility(batch: Batch) -> tuple[Tensor, Tensor]:
    """(T,) texts that take part, and (T, T): whether text j's image and text may serve as a negative for text i."""
    ids = batch.image_ids.index_select(0, batch.texts.image)
    usable = batch.texts.weight > 0
    return usable, (ids[:, None] != ids[None, :]) & usable


def sample_negatives(similarity: Tensor, eligible: Tensor) -> Tensor:
    """(T,) one column for each row, drawn with softmax(similarity) over its eligible columns; the row itself where it has none.

    similarity: (T, T), finite. eligible: (T, T) bool.
    """
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    allowed = torch.where(eligible.any(1, keepdim=True), eligible, own)
    logits = similarity.float().masked_fill(~allowed, float("-inf"))
    return torch.multinomial(torch.softmax(logits, dim=1), 1).squeeze(1)
