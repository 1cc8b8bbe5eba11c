"""Sigmoid loss for image-text pairs (SigLIP; Zhai et al. 2023): every pair of an image and a text is a yes or no of its own.

Letters: B images of the step and T texts of this rank, W ranks, E width of the embeddings.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Features, Loss, Pass, Taught
from vlm.objectives.pairs import Pairs, comparable, gather, pairs


class SigmoidContrastive(nn.Module):
    """-1/B sum_ij log sigmoid(z_ij (x_i . y_j / temperature + bias)), z_ij = 1 for texts of the image, else -1; the mean over images, not pairs.

    The temperature is the model's (the paper starts at 0.1). bias: a parameter, which starts where nearly all pairs are held for strangers, as they
    are. Questions and slots of bad samples take no part.
    """

    scope: Literal["pair", "micro"] = "pair"

    def __init__(self, bias: float = -10.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def count(self, batch: Batch) -> Tensor:
        """Captions with weight: B where each image has one."""
        return comparable(batch).sum()

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:  # noqa: ARG002
        """None: the embeddings are there."""
        return ()

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:  # noqa: ARG002
        """Of the batch's pairs."""
        return self.compare(
            model, pairs(features.image.embedding, features.texts["plain"].embedding, batch), features.teacher
        )

    def compare(self, model: VisionLanguageModel, own: Pairs, taught: Taught | None) -> Loss:  # noqa: ARG002
        """Images of this rank against the texts of one rank after another, in fp32 (or better).

        Each block of (T, T) logits is gone before the next one comes, and made again in the backward pass: no rank ever holds the (B, B) matrix.
        """
        rows = len(own.text)
        total = own.image.new_zeros(())
        best = own.image.new_full((rows,), float("-inf"))
        right = torch.zeros_like(own.valid)
        everyone = (gather(part).split(rows) for part in (own.text, own.ids, own.valid))
        for text, ids, valid in zip(*everyone, strict=True):
            positive, counted = own.ids[:, None] == ids[None, :], own.valid[:, None] & valid[None, :]
            arguments = (own.image, text, positive, counted, model.temperature, self.bias)
            value, top, found = checkpoint(sigmoid_block, *arguments, use_reentrant=False, preserve_rng_state=False)
            total = total + value
            right, best = torch.where(top > best, found, right), torch.maximum(top, best)
        count = own.valid.sum()
        return Loss(total, count, {"accuracy": ((right & own.valid).sum(), count)})


def sigmoid_block(
    image: Tensor, text: Tensor, positive: Tensor, counted: Tensor, temperature: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """() loss summed over the block's counted pairs; of each image (T,) its best logit and (T,) bool whether that is of a text of its own.

    image: (T, E). text: (T, E). positive, counted: (T, T) bool.
    """
    with torch.autocast(image.device.type, enabled=False):
        logits = image @ text.T / temperature + bias
        losses = F.softplus(torch.where(positive, -logits, logits))
    best, at = logits.detach().masked_fill(~counted, float("-inf")).max(1)
    return torch.where(counted, losses, 0.0).sum(), best, positive.gather(1, at[:, None]).squeeze(1)
