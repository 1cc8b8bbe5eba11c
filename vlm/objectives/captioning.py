"""Causal language modelling given the image (LM; Li et al. 2022, BLIP). Letters: T texts, L tokens, D width, V vocabulary, N predicted tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.data.batch import Batch, behind_prompt, target_positions
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Features, Loss, Pass, exact


@dataclass(frozen=True)
class Predictions:
    """What a pass says where a label is. states: (N, D). logits: (N, V), in fp32 or better. labels, weight: (N,)."""

    states: Tensor
    logits: Tensor
    labels: Tensor
    weight: Tensor


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
        if not outputs:
            zero = features.memory["decoder"].keys[0].sum() * 0.0
            return Loss(zero, self.count(batch), {"accuracy": (zero.detach(), zero.detach())})
        return self.judge(model, self.predictions(model, outputs[0], batch), features, batch)

    def predictions(self, model: VisionLanguageModel, output: Tensor, batch: Batch) -> Predictions:
        """Of a pass as requested, (R, L, D)."""
        rows = self._rows(batch)
        return predictions(model, output, batch.texts.ids[rows], batch.weight[rows], self._targets(batch, rows))

    def judge(self, model: VisionLanguageModel, found: Predictions, features: Features, batch: Batch) -> Loss:  # noqa: ARG002
        """The loss of one pass's predictions."""
        total, right, tokens = cross_entropy(found, self.label_smoothing)
        return Loss(total, self.count(batch), {"accuracy": (right, tokens)})

    def _rows(self, batch: Batch) -> Tensor:
        """(R,) rows of the texts that are learned."""
        device = batch.texts.ids.device
        if self._takes_all(batch):
            return torch.arange(len(batch.texts.ids), device=device)
        rows = batch.captions if self.of == "captions" else batch.questions
        return torch.empty(0, dtype=torch.long, device=device) if rows is None else rows

    def _targets(self, batch: Batch, rows: Tensor) -> Tensor:
        """(N,) where the labels stand in those rows, flattened."""
        texts, targets = batch.texts, batch.targets
        if targets is None:
            return target_positions(texts.mask[rows], texts.prompt[rows], batch.weight[rows])
        if self._takes_all(batch):
            return targets.texts
        found = targets.captions if self.of == "captions" else targets.questions
        assert found is not None
        return found

    def _takes_all(self, batch: Batch) -> bool:
        return self.of == "all" or (self.of == "captions" and batch.captions is None)


def predicted(mask: Tensor, prompt: Tensor) -> Tensor:
    """(T, L - 1) bool: whether token t + 1 is predicted from position t. mask: (T, L). prompt: (T,)."""
    return behind_prompt(mask, prompt)[:, 1:]


def sequence_loss(
    model: VisionLanguageModel, states: Tensor, ids: Tensor, weight: Tensor, at: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of the predicted tokens' cross-entropies; how many were right; how many there were. As `predictions`."""
    return cross_entropy(predictions(model, states, ids, weight, at), label_smoothing)


def predictions(model: VisionLanguageModel, states: Tensor, ids: Tensor, weight: Tensor, at: Tensor) -> Predictions:
    """The head runs where a label is only. states: (T, L, D) causal. ids: (T, L). weight: (T,). at: (N,) where the labels stand in the flattened ids.

    Each is predicted from the state before it, which is of the same text: no text's first token is a label.
    """
    at_labels = states.flatten(0, 1).index_select(0, at - 1)
    rows = torch.div(at, ids.shape[1], rounding_mode="floor")
    logits = exact(model.language_logits(at_labels))
    return Predictions(at_labels, logits, ids.flatten().index_select(0, at), weight.index_select(0, rows))


def cross_entropy(found: Predictions, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum over the labels; how many were right; how many there were."""
    losses = F.cross_entropy(found.logits, found.labels, reduction="none", label_smoothing=label_smoothing)
    right = (found.logits.argmax(1) == found.labels).sum()
    return (losses * found.weight).sum(), right, torch.full_like(right, len(found.labels))
