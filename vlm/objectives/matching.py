"""Image-text matching with in-batch hard negatives (ITM; Li et al. 2021, ALBEF section 3.2).

Letters: B images, T texts (one for each image in training), L tokens, D width.

The family's notorious crash, `multinomial: sum of probabilities <= 0`, cannot happen here: negatives are drawn in fp32 over the eligible columns
only, by the largest of the logits with Gumbel noise, and a row without any points at itself with weight 0. Nothing waits for the device.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.contrastive import comparable
from vlm.objectives.objective import Features, Loss, Pass, exact


class Matching:
    """Three pairs for each text: its own image, a hard negative image, and its image with a hard negative text."""

    scope: Literal["pair", "micro"] = "micro"

    def count(self, batch: Batch) -> Tensor:
        """Three pairs a weighted text, where another image is at hand; else none, as positives alone would teach to say yes."""
        return 3 * _counted(*eligibility(batch)).sum()

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

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:  # noqa: ARG002
        """Cross-entropy over match / no match, summed."""
        counted = _counted(*eligibility(batch))
        weight = counted.repeat(3)
        logits = exact(model.matching_logits(torch.cat([states[:, :1] for states in outputs])))
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(counted)] = 1
        losses = F.cross_entropy(logits, labels, reduction="none")
        total = torch.where(weight, losses, 0.0).sum()
        right = ((logits.argmax(1) == labels) & weight).sum()
        count = weight.sum()
        return Loss(total, count, {"accuracy": (right, count)})


def eligibility(batch: Batch) -> tuple[Tensor, Tensor]:
    """(T,) texts that take part, and (T, T): whether text j's image and text may serve as a negative for text i."""
    ids = batch.image_ids.index_select(0, batch.texts.image)
    usable = comparable(batch)
    return usable, (ids[:, None] != ids[None, :]) & usable


def _counted(usable: Tensor, eligible: Tensor) -> Tensor:
    """(T,) bool: texts that take part and have a negative."""
    return usable & eligible.any(1)


def sample_negatives(similarity: Tensor, eligible: Tensor) -> Tensor:
    """(T,) one column for each row, drawn with softmax(similarity) over its eligible columns; the row itself where it has none.

    similarity: (T, T); NaN counts as 0, so that a diverging run reaches the trainer's message. eligible: (T, T) bool.
    """
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    allowed = torch.where(eligible.any(1, keepdim=True), eligible, own)
    logits = similarity.float().nan_to_num()
    # The largest of logits plus Gumbel noise has the softmax's distribution (Gumbel 1954). torch.multinomial would check its input: older versions
    # wait for the device to do so, newer ones abort the process on a GPU.
    noisy = logits - torch.empty_like(logits).exponential_().log()
    return noisy.masked_fill(~allowed, float("-inf")).argmax(1)
