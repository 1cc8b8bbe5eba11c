"""What a frozen image encoder made of the training images, kept in files of some thousand: read in place of the images.

A file is safetensors: "tokens" (N, V, P, D), of N images in V augmentations, and "keys" (N,) int64, which say whose they are. Images that cannot be
decoded are in none. `vlm.features` makes them.

Letters: N images, V views (augmentations), P image tokens, D their width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vlm.data.images import mentions_side
from vlm.data.random import keyed_seed
from vlm.data.records import Record
from vlm.errors import BadImage


def record_texts(record: Record) -> list[str]:
    """All that is said of an image: its captions, questions and answers."""
    return [*record.captions, *(str(t) for q in record.questions for t in (q["question"], *(q.get("answers") or [])))]


def features_key(record: Record) -> int:
    """A signed 64-bit number: records of one image have the same features, but for those that may not be mirrored (`mentions_side`)."""
    return keyed_seed(record.source, record.key, mentions_side(record_texts(record))) - 2**63


class StoredFeatures:
    """The features of all training images. Picklable; each process opens the files for itself."""

    def __init__(self, files: Sequence[Path], views: int) -> None:
        """Raises OSError or SafetensorError for a file that cannot be read."""
        self.files, self.views = tuple(files), views
        self._open: dict[int, Any] = {}
        self._places: dict[int, tuple[int, int]] = {}
        for number, file in enumerate(self.files):
            with safe_open(file, "pt") as opened:
                keys = opened.get_tensor("keys").tolist()
            self._places |= {key: (number, row) for row, key in enumerate(keys)}

    def __call__(self, record: Record, turn: int) -> Tensor:
        """Image tokens (P, D) of the record's image, in the augmentation that is this turn's.

        Raises BadImage where the image could not be decoded when the features were made.
        """
        place = self._places.get(features_key(record))
        if place is None:
            raise BadImage(f"{record.source}/{record.key} could not be decoded when its features were made")
        file, row = place
        if file not in self._open:
            self._open[file] = safe_open(self.files[file], "pt").get_slice("tokens")
        tokens: Tensor = self._open[file][row : row + 1, turn % self.views : turn % self.views + 1]
        return tokens[0, 0].clone(memory_format=torch.contiguous_format)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}
