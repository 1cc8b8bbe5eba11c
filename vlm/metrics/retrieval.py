"""Recall at k of image-text retrieval, from a matrix of similarities."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROWS = 512  # rows compared at a time: bounds the memory for 5,000 images x 25,000 captions


@dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Share of queries, in percent, whose first k results hold a right one; by k."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    image_ranks: NDArray = field(compare=False, repr=False)
    """(N,) of each image: how many wrong texts come before its first right one."""
    text_ranks: NDArray = field(compare=False, repr=False)
    """(M,) of each text: how many wrong images come before its own."""

    @property
    def mean(self) -> float:
        """Mean of all recalls of both directions: the field's one number to choose a checkpoint by."""
        recalls = [*self.image_to_text.values(), *self.text_to_image.values()]
        return sum(recalls) / len(recalls)

    def named(self) -> dict[str, float]:
        """TR_R@k, the right texts found for an image; IR_R@k, the right image found for a text; mean_R@1 of the two."""
        to_text = {f"TR_R@{k}": value for k, value in self.image_to_text.items()}
        to_image = {f"IR_R@{k}": value for k, value in self.text_to_image.items()}
        return {**to_text, **to_image, "mean_R@1": (to_text["TR_R@1"] + to_image["IR_R@1"]) / 2}


def retrieval_scores(
    similarity: ArrayLike, image_ids: ArrayLike, text_ids: ArrayLike, ks: Sequence[int] = (1, 5, 10)
) -> RetrievalScores:
    """Recall at each k, both ways.

    similarity: (N, M), higher is more alike; row n is an image, column m a text. image_ids: (N,), text_ids: (M,), the
    id of the image that each text describes; an image may have several texts, and any of them is right. Of equal
    similarities the wrong ones are counted first, so a model that gives everything the same score gets nothing.

    Raises ValueError for shapes that do not fit, similarities that are not numbers, or a query without a right answer.
    """
    scores = np.asarray(similarity)
    images, texts = np.asarray(image_ids), np.asarray(text_ids)
    if images.ndim != 1 or texts.ndim != 1 or scores.shape != (len(images), len(texts)) or scores.size == 0:
        raise ValueError(
            f"similarity has shape {scores.shape}, image_ids {images.shape}, text_ids {texts.shape};"
            " expected (N, M), (N,) and (M,), not empty."
        )
    if not ks or min(ks) < 1:
        raise ValueError(f"ks={tuple(ks)}, expected one or more numbers of 1 and above.")
    image_ranks = _ranks(scores, images, texts, "image", "text")
    text_ranks = _ranks(scores.T, texts, images, "text", "image")
    return RetrievalScores(
        image_to_text={k: float((image_ranks < k).mean() * 100) for k in ks},
        text_to_image={k: float((text_ranks < k).mean() * 100) for k in ks},
        image_ranks=image_ranks,
        text_ranks=text_ranks,
    )


def _ranks(scores: NDArray, queries: NDArray, results: NDArray, query: str, result: str) -> NDArray:
    """Of each query, the wrong results at or above the best right one."""
    ranks = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _ROWS):
        rows = slice(start, start + _ROWS)
        part = scores[rows]
        if np.isnan(part).any():
            raise ValueError(f"similarity holds a NaN in {query} rows {start} to {start + len(part) - 1}.")
        right = queries[rows, None] == results[None, :]
        if not right.any(axis=1).all():
            alone = queries[rows][~right.any(axis=1)].tolist()[0]
            raise ValueError(f"the {query} with id {alone!r} has no {result} with that id; leave it out.")
        lowest = -np.inf if np.issubdtype(part.dtype, np.floating) else np.iinfo(part.dtype).min
        best = np.where(right, part, lowest).max(axis=1, keepdims=True)
        ranks[rows] = ((part >= best) & ~right).sum(axis=1)
    return ranks
