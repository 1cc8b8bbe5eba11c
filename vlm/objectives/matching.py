"""Image-text matching with in-batch hard negatives (ITM; Li et al. 2021, ALBEF section 3.2).

Letters: B images, T texts (one for each image in training) of this rank, W ranks, C columns: T, or W * T; L tokens, D width.

The family's notorious crash, `multinomial: sum of probabilities <= 0`, cannot happen here: negatives are drawn in fp32 over the eligible columns
only, by the largest of the logits with Gumbel noise, and a row without any points at itself with weight 0. Nothing waits for the device.

Hard negatives from the first step teach a new model nothing for hundreds of steps: the loss stands at that of guessing (0.637, one match of three),
while evenly drawn ones bring it down from step 100 on (benchmarks/RESULTS.md). Hence `easy`, a curriculum (Bengio et al. 2009).
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.model.vision_language import TextFeatures, VisionLanguageModel
from vlm.objectives.objective import Features, Loss, Pass, exact
from vlm.objectives.pairs import comparable, gather, pairs, rank, world


class Matching(nn.Module):
    """Three pairs for each text: its own image, a hard negative image, and its image with a hard negative text.

    negatives: local, from this rank's batch; joined, from all ranks' (Li et al. 2022): image tokens and texts are exchanged with their gradients,
    and texts must be of one length on all ranks (`Batch.lengthened`). easy: for so many epochs negatives are drawn evenly, and become as hard as
    the similarities say over as many more; 0: hard at once, as published.
    """

    scope: Literal["pair", "micro"] = "micro"
    steps: Tensor

    def __init__(self, negatives: Literal["local", "joined"] = "local", easy: float = 0.0) -> None:
        super().__init__()
        self.negatives, self.easy, self.easy_steps = negatives, easy, 0.0
        if easy:
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def prepare(self, epoch_steps: int) -> None:
        """Once, before training: how many optimizer steps an epoch has."""
        self.easy_steps = self.easy * epoch_steps

    @torch.no_grad()
    def after_step(self, taken: Tensor | None = None) -> None:
        """After each optimizer step; taken: () bool on the device, false where it was skipped."""
        if self.easy:
            self.steps += 1 if taken is None else taken

    @property
    def hardness(self) -> Tensor | float:
        """What the logits of negatives are multiplied with at the present step: 0, all alike, to 1; () on the device where it changes."""
        return (self.steps / self.easy_steps - 1).clamp(0, 1) if self.easy_steps else 1.0

    @property
    def _joined(self) -> bool:
        return self.negatives == "joined" and world() > 1

    def count(self, batch: Batch) -> Tensor:
        """Three pairs a weighted text, where another image is at hand; else none, as positives alone would teach to say yes."""
        return 3 * _counted(*eligibility(batch, self._joined)).sum()

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:
        """Positive, negative images, negative texts: in this order."""
        text, own = features.texts["plain"], batch.texts.image
        rows = torch.arange(len(own), device=own.device)
        _, eligible = eligibility(batch, self._joined)
        with torch.no_grad(), torch.autocast(own.device.type, enabled=False):
            mine = pairs(features.image.embedding, text.embedding, batch)
            images, texts = (gather(mine.image), gather(mine.text)) if self._joined else (mine.image, mine.text)
            itself = rows + rank() * len(own) if self._joined else rows
            hardness, temperature = self.hardness, model.temperature
            negative_text = sample_negatives(mine.image @ texts.T / temperature * hardness, eligible, itself)
            negative_image = sample_negatives((images @ mine.text.T / temperature * hardness).T, eligible, itself)
        if not self._joined:
            return [Pass(rows, own), Pass(rows, own[negative_image]), Pass(negative_text, own)]
        # Tokens travel, not keys and values, of which every layer has its own: the T chosen ones are projected here.
        whose = gather(own + rank() * len(batch))[negative_image]
        memory = model.memory(gather(features.image.tokens).index_select(0, whose), None, "fusion")
        states = model.fusion_view(text).states
        everyone = TextFeatures(gather(text.ids), gather(text.mask), None if states is None else gather(states))
        return [
            Pass(rows, own),
            Pass(rows, rows, memory=memory),
            Pass(rows, own, text=everyone.select(negative_text)),
        ]

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:  # noqa: ARG002
        """Cross-entropy over match / no match, summed."""
        counted = _counted(*eligibility(batch, self._joined))
        weight = counted.repeat(3)
        logits = exact(model.matching_logits(torch.cat([states[:, :1] for states in outputs])))
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(counted)] = 1
        losses = F.cross_entropy(logits, labels, reduction="none")
        total = torch.where(weight, losses, 0.0).sum()
        right = ((logits.argmax(1) == labels) & weight).sum()
        count = weight.sum()
        return Loss(total, count, {"accuracy": (right, count)})


def eligibility(batch: Batch, joined: bool = False) -> tuple[Tensor, Tensor]:
    """(T,) texts that take part, and (T, C): whether text j's image and text, of this rank or of all, may serve as a negative for text i."""
    ids = batch.image_ids.index_select(0, batch.texts.image)
    usable = comparable(batch)
    key_ids, key_usable = ids, usable
    if joined:
        key_ids, known = gather(torch.stack([ids, usable.long()], dim=1)).unbind(1)
        key_usable = known > 0
    return usable, (ids[:, None] != key_ids[None, :]) & key_usable


def _counted(usable: Tensor, eligible: Tensor) -> Tensor:
    """(T,) bool: texts that take part and have a negative."""
    return usable & eligible.any(1)


def sample_negatives(similarity: Tensor, eligible: Tensor, itself: Tensor) -> Tensor:
    """(T,) one column for each row, drawn with softmax(similarity) over its eligible columns; `itself` where it has none.

    similarity: (T, C); NaN counts as 0, so that a diverging run reaches the trainer's message. eligible: (T, C) bool. itself: (T,) each row's column.
    """
    own = torch.arange(similarity.shape[1], device=similarity.device) == itself[:, None]
    allowed = torch.where(eligible.any(1, keepdim=True), eligible, own)
    logits = similarity.float().nan_to_num()
    # The largest of logits plus Gumbel noise has the softmax's distribution (Gumbel 1954). torch.multinomial would check its input: older versions
    # wait for the device to do so, newer ones abort the process on a GPU.
    noisy = logits - torch.empty_like(logits).exponential_().log()
    return noisy.masked_fill(~allowed, float("-inf")).argmax(1)
