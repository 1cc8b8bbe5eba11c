"""How well captions fit their images by a model's own embeddings: no references needed, in the form of CLIPScore (Hessel et al. 2021).

The number is this model's opinion: another model's embeddings give other numbers for the same captions, so scores compare captions, never models.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm.errors import UserError
from vlm.metrics.captions import listed

_WEIGHT = 2.5  # CLIPScore's: it only spreads the values
_NUMBER_AT_END = re.compile(r"(?:^|[^0-9])0*([0-9]+)$")


class Embedder(Protocol):
    """What gives images and texts vectors of one space; `vlm.predictor.Predictor` is one."""

    def embed_images(self, images: Sequence[Any]) -> Any:
        """(N, E)."""

    def embed_texts(self, texts: Sequence[str]) -> Any:
        """(N, E)."""


def image_text_scores(images: ArrayLike, texts: ArrayLike) -> NDArray:
    """(N,): 2.5 x max(cosine, 0) of each image (N, E) and its text (N, E)."""
    left, right = np.asarray(images, dtype=np.float64), np.asarray(texts, dtype=np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosine = (left * right).sum(1) / np.where(norms > 0, norms, 1)
    return np.asarray(_WEIGHT * np.maximum(cosine, 0))


def score_pairs(embedder: Embedder, captions: Mapping[Any, str], folder: Path | str, names: Mapping[Any, str]) -> float:
    """The mean of `image_text_scores` over captions by image id; the photographs are those of `folder`.

    names: file name by image id, where known (COCO's "file_name"). Else a file is found that is called like the id (12.jpg) or ends in its number
    (COCO_val2014_000000000012.jpg). Raises UserError, naming the ids, where none or several are found.
    """
    if not captions:
        raise UserError("No caption to score: the predictions are empty.")
    paths = _photographs(Path(folder), captions, names)
    scores = image_text_scores(
        embedder.embed_images([paths[key] for key in captions]), embedder.embed_texts(list(captions.values()))
    )
    return float(scores.mean())


def _photographs(folder: Path, keys: Mapping[Any, str], names: Mapping[Any, str]) -> dict[Any, Path]:
    found: dict[str, list[Path]] = {}
    try:
        files = [Path(entry.path) for entry in os.scandir(folder) if entry.is_file()]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; expected a folder of the images.") from None
    for path in files:
        number = _NUMBER_AT_END.search(path.stem)
        for called in {path.name, path.stem, *(number.groups() if number else ())}:
            found.setdefault(called, []).append(path)
    places = {key: found.get(names.get(key, str(key)), []) for key in keys}
    for count, said in ((0, "no file"), (2, "several files")):
        if wrong := [key for key, paths in places.items() if min(2, len(paths)) == count]:
            raise UserError(
                f"{folder}: {said} for {listed(wrong, 'image')} of {len(keys)}; expected one each, called like the id, ending in its number, or as"
                ' the references\' "images" say: {"id": 1, "file_name": "..."}.'
            )
    return {key: paths[0] for key, paths in places.items()}
