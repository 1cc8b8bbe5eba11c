"""Visual question answering as classification over a list of answers (METER; ViLT, BEiT-3): each answer's official accuracy is predicted.

Letters: T questions, L tokens, D width, A answers of the list.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.data.batch import Batch
from vlm.errors import CheckpointError
from vlm.metrics.vqa import agreement, normalize_answer
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.cached import CachedLoss
from vlm.objectives.objective import Loss, exact
from vlm.tasks.task import Record
from vlm.tasks.vqa_task import VqaTask


class ClassifyVqa(VqaTask):
    """The loss of a question is the binary cross-entropy of every answer of the list, summed (METER: the mean, times their number).

    An answer's target is the official accuracy that it would get: of ten annotators 0, 0.3, 0.6, 0.9, 1. Both sides are normalised officially, so
    that "Two" counts for "2"; METER looks raw answers up in a normalised list and loses those. Answers outside of the list are no target: a
    question with no other has a row of zeros.
    """

    def __init__(self, model: VisionLanguageModel, answers: Sequence[str]) -> None:
        super().__init__(model, {}, {})
        self.weights = {"classifying": 1.0}
        check_answers(model, answers)
        self.answers = list(answers)
        self._place = {normalize_answer(answer): i for i, answer in reversed(list(enumerate(answers)))}
        self._find = lru_cache(1 << 20)(lambda answer: self._place.get(normalize_answer(answer), -1))

    def targets(self, sources: Iterable[Mapping[str, Any]]) -> Tensor:
        """(T, A) fp32, from the annotators' answers of each source; zeros where it has none."""
        rows: list[list[float]] = []  # question, answer, target
        count = 0
        for row, source in enumerate(sources):
            count += 1
            given = source.get("answers") or ()
            found = Counter(place for answer in given if (place := self._find(answer)) >= 0)
            rows += [[row, place, agreement(matches, len(given))] for place, matches in found.items()]
        targets = torch.zeros(count, len(self.answers))
        if rows:
            question, answer, value = torch.tensor(rows, dtype=torch.float64).unbind(1)
            targets[question.long(), answer.long()] = value.float()
        return targets

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The questions; those of a set with a weight of its own count as others."""
        return {"classifying": batch.texts.weight.sum()}

    def forward(self, batch: Batch, cached: Mapping[str, CachedLoss] | None = None) -> dict[str, Loss]:  # noqa: ARG002
        """The scalar is the official accuracy of the best answers, as the batch's annotators have it."""
        logits = exact(self.model.answer_logits(self.question_states(batch)))
        targets = self.targets(batch.sources).to(logits)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
        present = batch.texts.weight > 0
        right = targets.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)[present].sum()
        scalars = {"accuracy": (right, present.sum())}
        return {"classifying": Loss((losses * batch.weight).sum(), batch.texts.weight.sum(), scalars)}

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Record]:
        """One record a question."""
        return self.records(batch, best_answers(self.model, self.question_states(batch), self.answers))


def best_answers(model: VisionLanguageModel, states: Tensor, answers: Sequence[str]) -> list[tuple[str, float]]:
    """For each question the answer with the highest logit, and the logit's sigmoid: the accuracy that the model expects of it. states: (T, L, D)."""
    probabilities, places = exact(model.answer_logits(states)).sigmoid().max(1)
    return [(answers[place], p) for place, p in zip(places.tolist(), probabilities.tolist(), strict=True)]


def check_answers(model: VisionLanguageModel, answers: Sequence[str]) -> None:
    """Refuses a list that is not the classifier's.

    Raises:
        CheckpointError: the model has no classifier, or one of another number of answers.
    """
    if "classifier" not in model.config.heads:
        raise CheckpointError(
            "vqa.form=classify, but this checkpoint has no classifier head; give one that was trained with vqa.form=classify, or use the form "
            "that it was trained in."
        )
    if len(answers) != model.config.answers:
        raise CheckpointError(
            f"answers.json has {len(answers)} answers, the classifier {model.config.answers}: they do not belong together; copy the checkpoint again."
        )
