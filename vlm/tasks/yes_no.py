"""Yes or no by two witnesses: the decoder, and how like the image is to what the question states, as the contrastive head sees it.

The contrastive head has seen every caption against other images, so it knows what is not there; a decoder learns "no" from answers alone. What each
says is a log ratio, so that they add up (`vlm.tasks.reranking` adds the same way), with weights that `vlm evaluate --calibrate` fits: the similarity
has a level of its own, and a decoder that learned from few answers may be surer than it is right. Comparing image and statement: Song et al. 2022
(CLIP Models are Few-shot Learners). The answer to any other question stays the decoder's.

Letters: T questions, R of them that state something, L tokens, E width of the embeddings, N answers to fit by.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm.data.collate import pad
from vlm.data.statements import statement
from vlm.data.text import Tokenizer, clean_caption
from vlm.errors import CheckpointError
from vlm.model.attention import CrossMemory
from vlm.model.pretrained import CONFIG
from vlm.model.ranking import AnswerTree, score_answers
from vlm.model.vision_language import VisionLanguageModel

KEY = "yes_no"
FOLDS = 10


@dataclass(frozen=True)
class Evidence:
    """similarity: of statement and image, over the temperature. decoder: log p(yes) - log p(no)."""

    similarity: float
    decoder: float


@dataclass(frozen=True)
class YesNoWeights:
    """The log odds of yes: similarity x the similarity + decoder x the decoder's + offset."""

    similarity: float
    decoder: float
    offset: float

    def decide(self, answer: str, probability: float, evidence: Evidence) -> tuple[str, float]:
        """Answer and probability in place of the decoder's yes or no: both of its probabilities together are divided anew."""
        both = min(1.0, probability * (1.0 + math.exp(-evidence.decoder if answer == "yes" else evidence.decoder)))
        odds = self.similarity * evidence.similarity + self.decoder * evidence.decoder + self.offset
        return "yes" if odds > 0 else "no", both / (1.0 + math.exp(-abs(odds)))


def stored_weights(metadata: dict[str, Any]) -> YesNoWeights | None:
    """Those that config.json has; None where it has none.

    Raises:
        CheckpointError: they are no three numbers.
    """
    calibration = metadata.get("calibration") or {}
    found = calibration.get(KEY) if isinstance(calibration, dict) else None
    if found is None:
        return None
    names = ("similarity", "decoder", "offset")
    given = found if isinstance(found, dict) else {}
    values = [float(v) for v in map(given.get, names) if isinstance(v, int | float) and math.isfinite(v)]
    if len(values) < len(names):
        raise CheckpointError(
            f"{CONFIG}: calibration.{KEY} is {found!r}, expected a number for each of {', '.join(names)}; copy the checkpoint again."
        )
    return YesNoWeights(*values)


class YesNoJudge:
    """Asks the second witness. weights: None where the evidence is gathered to fit them."""

    def __init__(
        self, model: VisionLanguageModel, tokenizer: Tokenizer, metadata: dict[str, Any], weights: YesNoWeights | None
    ) -> None:
        """metadata: config.json of the checkpoint, which says how its texts were compared with images."""
        text = metadata.get("text") or {}
        self.model, self.tokenizer, self.weights = model, tokenizer, weights
        self.prompt: str = text.get("prompt", "") if metadata.get("task") == "pretraining" else ""
        self.max_tokens: int = text.get("max_tokens", 32)
        words = [tokenizer.encode(word)[1:-1] for word in ("yes", "no")]
        self.tree = AnswerTree(words, tokenizer.sep_id) if all(words) and words[0] != words[1] else None

    @torch.no_grad()
    def evidence(
        self,
        answers: Sequence[tuple[str, float]],
        questions: Sequence[str],
        images: Tensor,
        memory: CrossMemory,
        ids: Tensor,
        mask: Tensor,
    ) -> list[Evidence | None]:
        """For each question; None where the decoder's answer is neither yes nor no, or the question states nothing.

        answers: the decoder's. images: (T, E) embeddings. memory: of T rows. ids, mask: (T, L), the prompts.
        """
        stated = [
            statement(question) if answer in ("yes", "no") else None
            for (answer, _), question in zip(answers, questions, strict=True)
        ]
        texts = {row: text for row, text in enumerate(stated) if text is not None}
        found: list[Evidence | None] = [None] * len(answers)
        if self.tree is None or not texts:
            return found
        rows = torch.tensor([*texts], device=ids.device)
        encoded = [self.tokenizer.encode(clean_caption(text), self.max_tokens, self.prompt) for text in texts.values()]
        padded = (t.to(ids.device) for t in pad(encoded, self.tokenizer.pad_id))
        embeddings = self.model.encode_text(*padded).embedding
        assert embeddings is not None
        similarity = (images[rows].float() * embeddings.float()).sum(1) / self.model.temperature.float()
        scores = score_answers(self.model, memory.select(rows), ids[rows], mask[rows], self.tree)
        decoder = scores[:, 0] - scores[:, 1]
        for row, alike, odds in zip(texts, similarity.tolist(), decoder.tolist(), strict=True):
            found[row] = Evidence(alike, odds)
        return found

    def decide(
        self, answers: Sequence[tuple[str, float]], evidence: Sequence[Evidence | None]
    ) -> list[tuple[str, float]]:
        """The answers with their probabilities, judged anew where there is evidence, and weights."""
        return [
            answer if seen is None or self.weights is None else self.weights.decide(*answer, seen)
            for answer, seen in zip(answers, evidence, strict=True)
        ]


def make_judge(
    model: VisionLanguageModel, tokenizer: Tokenizer, metadata: dict[str, Any], fitting: bool = False
) -> YesNoJudge | None:
    """The judge with the weights that the checkpoint has; None where it has none, or lacks one of the witnesses. fitting: without any weights, to
    gather what they are fitted by.

    Raises:
        CheckpointError: the weights are damaged.
    """
    weights, settings = None if fitting else stored_weights(metadata), model.config
    blind = settings.decoder == "separate" and settings.decoder_reads == "question"
    if (weights is None and not fitting) or blind or not {"contrastive", "language"} <= set(settings.heads):
        return None
    return YesNoJudge(model, tokenizer, metadata, weights)


def fit_weights(evidence: Sequence[Evidence], yes: Sequence[bool], images: Sequence[int]) -> YesNoWeights | None:
    """Logistic regression on both witnesses; None where it explains images that it was not fitted on (ten folds) no better than on the decoder alone.

    yes: (N,), what the annotators' majority says. images: (N,), of which image each is.
    """
    both = np.array([[seen.similarity, seen.decoder, 1.0] for seen in evidence]).reshape(-1, 3)
    wanted = np.array(yes, dtype=bool)
    if min(wanted.sum(), (~wanted).sum()) < FOLDS:
        return None
    distinct = {image: place for place, image in enumerate(sorted(set(images)))}
    fold = np.array([distinct[image] % FOLDS for image in images])
    if _held_out(both, wanted, fold) <= _held_out(both[:, 1:], wanted, fold):
        return None
    return YesNoWeights(*map(float, _logistic(both, wanted)))


def _held_out(features: NDArray, wanted: NDArray, fold: NDArray) -> float:
    """The log-likelihood of each fold by what was fitted on the others, summed."""
    total = 0.0
    for part in np.unique(fold):
        odds = features[fold == part] @ _logistic(features[fold != part], wanted[fold != part])
        total -= np.logaddexp(0.0, np.where(wanted[fold == part], -odds, odds)).sum()
    return float(total)


def _logistic(features: NDArray, wanted: NDArray, steps: int = 50) -> NDArray:
    """Weights of the logistic regression by Newton's method, on features of one size, with a prior too weak to matter where data say anything."""
    spread = np.abs(features).max(0) + 1e-12
    scaled = features / spread
    weights, prior = np.zeros(features.shape[1]), 1e-3 * np.eye(features.shape[1])
    for _ in range(steps):
        share = 1.0 / (1.0 + np.exp(-np.clip(scaled @ weights, -30, 30)))
        slope = scaled.T @ (wanted - share) - prior @ weights
        curvature = (scaled * (share * (1 - share))[:, None]).T @ scaled + prior
        change = np.linalg.solve(curvature, slope)
        weights += change
        if np.abs(change).max() < 1e-9:
            break
    result: NDArray = weights / spread
    return result


def as_facts(weights: YesNoWeights | None) -> dict[str, Any]:
    """What config.json stores."""
    return {} if weights is None else {KEY: asdict(weights)}
