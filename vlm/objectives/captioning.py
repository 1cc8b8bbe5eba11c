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

    label_smoothing: PyTorch's definition. per: tokens (the mean over all predicted tokens, BLIP's pretraining and captioning) or texts (each text's
    sum, over the sum of the weights: VQA, where the weights of a question's answers sum to 1).
    """

    scope: Literal["pair", "micro"] = "micro"

    def __init__(self, label_smoothing: float = 0.1, per: Literal["tokens", "texts"] = "tokens") -> None:
        self.label_smoothing = label_smoothing
        self.per = per

    def count(self, batch: Batch) -> Tensor:
        """Weighted tokens, or weighted texts."""
        texts = batch.texts
        if self.per == "texts":
            return texts.weight.sum()
        return (predicted(texts.mask, texts.prompt) * texts.weight[:, None]).sum()

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:  # noqa: ARG002
        """Every text with its own image, causal."""
        rows = torch.arange(len(batch.texts.ids), device=batch.texts.ids.device)
        return [Pass(rows, batch.texts.image, causal=True)]

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:  # noqa: ARG002
        """Weighted cross-entropy, summed."""
        texts = batch.texts
        total, right, tokens = sequence_loss(
            model, outputs[0], texts.ids, texts.mask, texts.prompt, texts.weight, self.label_smoothing
        )
        return Loss(total, self.count(batch), {"accuracy": (right, tokens)})


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
