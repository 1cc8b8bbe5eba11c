"""BLEU, ROUGE-L and CIDEr-D of captions: the numbers of pycocoevalcap 1.2, in Python alone.

Sources: BLEU, Papineni et al. 2002 (counts of the whole corpus, closest reference length); ROUGE-L, Lin 2004; CIDEr-D,
Vedantam et al. 2015, which pycocoevalcap calls CIDEr. Constants and order of operations follow pycocoevalcap, because
the published numbers do.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.errors import UserError
from vlm.metrics.ptb import tokenize_all

_ORDERS = 4  # n-grams of 1 to 4 words
_TINY, _SMALL = 1e-15, 1e-9  # BLEU's guards: a score without a match is about 0, never 0 / 0
_BETA = 1.2  # ROUGE-L's weight of recall
_SIGMA = 6.0  # CIDEr-D's tolerance for another length, in bigrams

Ngrams = Counter[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Scores of a corpus, unrounded, in 0..1; CIDEr in 0..10 (a paper's "CIDEr 120" is 1.2 here)."""

    Bleu_1: float
    Bleu_2: float
    Bleu_3: float
    Bleu_4: float
    ROUGE_L: float
    CIDEr: float
    per_image: Mapping[Any, Mapping[str, float]]
    """The same six numbers of every image. CIDEr and ROUGE_L are the means of these; BLEU is not."""

    def corpus(self) -> dict[str, float]:
        """The six numbers of the corpus by name, in the usual order."""
        return {name: getattr(self, name) for name in METRICS}

    @property
    def cider_per_image(self) -> dict[Any, float]:
        """CIDEr-D of every image."""
        return {key: scores["CIDEr"] for key, scores in self.per_image.items()}


METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")


def caption_scores(
    references: Mapping[Any, Sequence[str]],
    predictions: Mapping[Any, str],
    tokenize: bool = True,
    document_frequencies: "CiderD | None" = None,
) -> CaptionScores:
    """Score one caption an image against the image's reference captions.

    `tokenize=False` takes captions that are tokenized already, words separated by spaces. An empty caption scores 0 (but
    for ROUGE_L, which is 1 where a reference is empty too once its punctuation is gone, as pycocoevalcap says); of a
    single image CIDEr is 0, since every n-gram occurs in all images. document_frequencies: CIDEr-D with the weights
    of another corpus than these references; an image's score then does not depend on what other images are scored with
    it, but it is not the number that papers give. Raises UserError, naming the ids, where the two mappings do not hold
    the same images or an image has no reference.
    """
    _check(references, predictions)
    if tokenize:
        references, predictions = tokenized(references, predictions)
    keys = list(references)
    captions, candidates = list(references.values()), [predictions[key] for key in keys]

    bleu, bleu_each = _bleu(candidates, captions)
    rouge_each = [_rouge_l(*pair) for pair in zip(candidates, captions, strict=True)]
    cider = document_frequencies or CiderD(captions)
    cider_each = [cider.score(*pair) for pair in zip(candidates, captions, strict=True)]
    return CaptionScores(
        Bleu_1=bleu[0],
        Bleu_2=bleu[1],
        Bleu_3=bleu[2],
        Bleu_4=bleu[3],
        ROUGE_L=math.fsum(rouge_each) / len(keys),
        CIDEr=math.fsum(cider_each) / len(keys),
        per_image={
            key: dict(zip(METRICS, (*bleu_each[index], rouge_each[index], cider_each[index]), strict=True))
            for index, key in enumerate(keys)
        },
    )


def tokenized(
    references: Mapping[Any, Sequence[str]], predictions: Mapping[Any, str]
) -> tuple[dict[Any, list[str]], dict[Any, str]]:
    """Both in the references' order, each caption as its tokens with spaces between, as the metrics count them."""
    _check(references, predictions)
    flat = iter(tokenize_all([caption for captions in references.values() for caption in captions]))
    candidates = tokenize_all([predictions[key] for key in references])
    return (
        {key: [next(flat) for _ in captions] for key, captions in references.items()},
        dict(zip(references, candidates, strict=True)),
    )


def _check(references: Mapping[Any, Sequence[str]], predictions: Mapping[Any, str]) -> None:
    if not references:
        raise UserError("No image to score: the references are empty; give at least one image with its captions.")
    for key, captions in references.items():
        if isinstance(captions, str):
            raise UserError(f"The references of image {key!r} are one text, expected a list of captions.")
        if not captions:
            raise UserError(f"Image {key!r} has no reference caption; leave the image out or add one.")
        if not all(isinstance(caption, str) for caption in captions):
            raise UserError(f"Image {key!r} has a reference caption that is not text.")
    for key, caption in predictions.items():
        if not isinstance(caption, str):
            raise UserError(f"The predicted caption of image {key!r} is {caption!r}, expected one text.")
    if missing := [key for key in references if key not in predictions]:
        raise UserError(
            f"{listed(missing, 'image')} of {len(references)} without a predicted caption; the scores are of a whole"
            " split: predict the others (an empty caption counts as 0) or leave them out of the references."
        )
    if unknown := [key for key in predictions if key not in references]:
        raise UserError(
            f"{listed(unknown, 'predicted caption')} for an image without references; are the two of the same split?"
        )


def listed(keys: Sequence[Hashable], noun: str) -> str:
    """'3 images (1, 2, 3)', with the first five only: how error messages name a few of many."""
    first = ", ".join(repr(key) for key in keys[:5]) + (", ..." if len(keys) > 5 else "")
    return f"{len(keys)} {noun}{'' if len(keys) == 1 else 's'} ({first})"


def _ngrams(words: Sequence[str]) -> list[Ngrams]:
    """Counts of the n-grams, a Counter for each n from 1 to 4."""
    return [
        Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1)) for n in range(1, _ORDERS + 1)
    ]


def _bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[float], list[list[float]]]:
    """BLEU-1..4 of the corpus, and of each caption."""
    each: list[list[float]] = []
    total = [0] * (2 + 2 * _ORDERS)
    for candidate, captions in zip(candidates, references, strict=True):
        words = candidate.split()
        limits = [Counter[tuple[str, ...]]() for _ in range(_ORDERS)]
        lengths = []
        for caption in captions:
            reference = caption.split()
            lengths.append(len(reference))
            for limit, counts in zip(limits, _ngrams(reference), strict=True):
                limit |= counts
        matches = [(counts & limit).total() for counts, limit in zip(_ngrams(words), limits, strict=True)]
        guesses = [max(0, len(words) - order) for order in range(_ORDERS)]
        closest = min(lengths, key=lambda length: (abs(length - len(words)), length))
        statistics = [len(words), closest, *matches, *guesses]
        each.append(_bleu_of(statistics))
        total = [before + new for before, new in zip(total, statistics, strict=True)]
    return _bleu_of(total), each


def _bleu_of(statistics: Sequence[int]) -> list[float]:
    """From [length, reference length, matches of 4 orders, n-grams of 4 orders]."""
    length, reference_length = statistics[:2]
    matches, guesses = statistics[2 : 2 + _ORDERS], statistics[2 + _ORDERS :]
    ratio = (length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order in range(_ORDERS):
        product *= (matches[order] + _TINY) / (guesses[order] + _SMALL)
        scores.append(product ** (1 / (order + 1)) * brevity)
    return scores


def _rouge_l(candidate: str, references: Iterable[str]) -> float:
    """ROUGE-L, with the best precision and the best recall taken separately over the references, as pycocoevalcap."""
    words = candidate.split(" ")  # not split(): there an empty caption is one empty word, and so it is here
    precision = recall = 0.0
    for caption in references:
        reference = caption.split(" ")
        common = _longest_common_subsequence(words, reference)
        precision = max(precision, common / len(words))
        recall = max(recall, common / len(reference))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


@dataclass(frozen=True)
class _Weighted:
    """A caption's n-grams by order, weighted; their norms; how many bigrams it has."""

    vectors: list[dict[tuple[str, ...], float]]
    norms: list[float]
    bigrams: int


class CiderD:
    """CIDEr-D of single captions; an n-gram's weight is log(images / images with a reference that holds it), counted once over a corpus."""

    def __init__(self, references: Iterable[Sequence[str]]) -> None:
        """references: each image's captions, tokenized, words separated by spaces."""
        images, images_with = 0, Counter[tuple[str, ...]]()
        for captions in references:
            images += 1
            images_with.update(
                {ngram for caption in captions for counts in _ngrams(caption.split()) for ngram in counts}
            )
        self._log_images = math.log(images)
        self._log_images_with = {ngram: math.log(count) for ngram, count in images_with.items()}
        self._known: dict[str, _Weighted] = {}

    def score(self, candidate: str, references: Sequence[str]) -> float:
        """0..10, of a tokenized caption against its image's tokenized references."""
        caption = self._weighted(candidate)
        score = 0.0
        for text in references:
            if text not in self._known:
                self._known[text] = self._weighted(text)
            reference = self._known[text]
            penalty = math.exp(-((caption.bigrams - reference.bigrams) ** 2) / (2 * _SIGMA**2))
            for order in range(_ORDERS):
                norm = caption.norms[order] * reference.norms[order]
                if norm == 0:  # an n-gram of every image weighs nothing; a caption of such n-grams has no direction
                    continue
                other = reference.vectors[order]
                product = sum(min(v, other[n]) * other[n] for n, v in caption.vectors[order].items() if n in other)
                score += product / norm * penalty
        return 10 * score / _ORDERS / len(references)

    def _weighted(self, text: str) -> _Weighted:
        ngrams = _ngrams(text.split())
        vectors = [
            {
                ngram: count * (self._log_images - self._log_images_with.get(ngram, 0.0))
                for ngram, count in counts.items()
            }
            for counts in ngrams
        ]
        return _Weighted(
            vectors, [math.sqrt(sum(v**2 for v in vector.values())) for vector in vectors], ngrams[1].total()
        )
