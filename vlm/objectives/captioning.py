"""Causal language modelling given the image (LM; Li et al. 2022, BLIP). Letters: T texts, L tokens, D width, V vocabulary, N predicted tokens."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Features, Loss, Pass, exact


class Captioning:
    """Predicts each token behind the prompt from those before it.

    of: captions or answers (what follows the questions) where a batch has both, or all its texts. label_smoothing: PyTorch's definition.
    per: tokens (the mean over all predicted tokens, BLIP's pretraining and captioning) or texts (each text's sum, over the sum of the weights:
    VQA, where the weights of a question's answers sum to 1).
    """

    scope: Literal["pair", "micro"] = "micro"

    def __init__(
        self,
        label_smoothing: float = 0.1,
        per: Literal["tokens", "texts"] = "tokens",
        of: Literal["captions", "answers", "all"] = "all",
    ) -> None:
        self.label_smoothing = label_smoothing
        self.per = per
        self.of = of

    def count(self, batch: Batch) -> Tensor:
        """Weighted tokens, or weighted texts."""
        texts, rows = batch.texts, self._rows(batch)
        weight = texts.weight[rows]
        if self.per == "texts":
            return weight.sum()
        return (predicted(texts.mask[rows], texts.prompt[rows]) * weight[:, None]).sum()

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:  # noqa: ARG002
        """Every such text with its own image, causal; none where there is no such text."""
        rows = self._rows(batch)
        return [Pass(rows, batch.texts.image[rows], causal=True)] if len(rows) else []

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:
        """Weighted cross-entropy, summed."""
        texts, rows = batch.texts, self._rows(batch)
        if len(rows) == 0:
            zero = features.memory["decoder"].keys[0].sum() * 0.0
            return Loss(zero, self.count(batch), {"accuracy": (zero.detach(), zero.detach())})
        given = (texts.ids[rows], texts.mask[rows], texts.prompt[rows], texts.weight[rows])
        total, right, tokens = sequence_loss(model, outputs[0], *given, self.label_smoothing)
        return Loss(total, self.count(batch), {"accuracy": (right, tokens)})

    def _rows(self, batch: Batch) -> Tensor:
        """(R,) rows of the texts that are learned."""
        device = batch.texts.ids.device
        if self.of == "all" or (self.of == "captions" and batch.captions is None):
            return torch.arange(len(batch.texts.ids), device=device)
        rows = batch.captions if self.of == "captions" else batch.questions
        return torch.empty(0, dtype=torch.long, device=device) if rows is None else rows


def predicted(mask: Tensor, prompt: Tensor) -> Tensor:
    """(T, L - 1) bool: whether token t + 1 is predicted from position t. mask: (T, L). prompt: (T,)."""
    target = torch.arange(1, mask.shape[1], device=mask.device)
    return mask[:, 1:] & (target >= prompt[:, None])


def sequence_loss(
    model: VisionLanguageModel,
    states: Tensor,
    ids: Tensor,
    mask: Tensor,
    prompt: Tensor,
    weight: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of the predicted tokens' cross-entropies; how many were right; how many there were. The head runs where a label is only.

    states: (T, L, D) causal. ids, mask: (T, L). prompt, weight: (T,).
    """
    wanted = predicted(mask, prompt) & (weight > 0)[:, None]
    labels = ids[:, 1:][wanted]
    logits = exact(model.language_logits(states[:, :-1][wanted]))
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    weights = weight[:, None].expand_as(wanted)[wanted]
    total = (losses * weights).sum()
    return total, (logits.argmax(1) == labels).sum(), wanted.sum()
