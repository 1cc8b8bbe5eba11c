"""Embeddings of a folder's images, kept on the disk, so that a search encodes only what is new or has changed.

One file a folder and model, `images/*.safetensors` in `vlm.hub.cache_folder`: the names of the images, their sizes and times of change, and their
embeddings. A file that is damaged is made anew; one that cannot be written costs the next search its time and nothing else.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlm.data.images import decode_image
from vlm.errors import BadImage, UserError
from vlm.files import replacing
from vlm.hub import cache_folder
from vlm.predictor import Predictor

Stamp = tuple[int, int]
"""Bytes and time of change (ns) of a file: where both are as they were, its image is."""
Say = Callable[[str], None]

_VERSION = "1"
_SAVE_EVERY = 1024  # images: what a kill may cost


class ImageIndex:
    """Embeddings of one folder's images by one model.

    file: where it is kept, or None. entries: by name, what the file was like and its embedding (E,).
    """

    def __init__(self, folder: Path, file: Path | None, say: Say) -> None:
        """say: takes a line for the user."""
        self.folder, self.file, self.say = folder, file, say
        self.entries: dict[str, tuple[Stamp, Tensor]] = {}
        if file is not None and file.exists():
            try:
                self.entries = _read(file)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError):
                say(f"{file} is damaged; the index of {folder} is made anew.")

    def update(self, predictor: Predictor, names: Sequence[str], batch_size: int = 16) -> Iterator[str]:
        """Encodes those of `names` that are new or have changed and forgets the folder's images that are gone; yields each name when it is done.

        What cannot be used is said, and not kept.
        """
        stamps = {name: stamp for name in {*self.entries, *names} if (stamp := _stamp(self.folder / name)) is not None}
        kept = {name: entry for name, entry in self.entries.items() if stamps.get(name) == entry[0]}
        changed = kept.keys() != self.entries.keys()
        self.entries = kept
        yield from (name for name in names if name in kept)
        new = [name for name in names if name not in kept]
        try:
            for first in range(0, len(new), batch_size):
                part = new[first : first + batch_size]
                changed |= self._encode(predictor, part, stamps)
                yield from part
                if changed and (first // batch_size + 1) % (_SAVE_EVERY // batch_size) == 0:
                    self._write()
        finally:  # an interrupted search has not worked in vain
            if changed:
                self._write()

    def _encode(self, predictor: Predictor, names: Sequence[str], stamps: dict[str, Stamp]) -> bool:
        """Whether there was a good one."""
        images = {}
        for name in names:
            try:
                images[name] = decode_image(self.folder / name)
            except BadImage as error:
                self.say(" ".join(str(error).splitlines()))
        for name, embedding in zip(images, predictor.embed_images(list(images.values())), strict=True):
            self.entries[name] = (stamps.get(name, (-1, -1)), embedding)
        return bool(images)

    def _write(self) -> None:
        """Whole or not at all."""
        if self.file is None:
            return
        stamps = torch.tensor([stamp for stamp, _ in self.entries.values()], dtype=torch.long).reshape(-1, 2)
        tensors = {"stamps": stamps}
        if self.entries:
            tensors["embeddings"] = torch.stack([embedding for _, embedding in self.entries.values()])
        try:
            with replacing(self.file) as new:
                new.write_bytes(save(tensors, {"names": json.dumps(list(self.entries)), "version": _VERSION}))
        except UserError as error:
            self.say(f"{error} The next search encodes these images again.")
            self.file = None


def index_file(predictor: Predictor, folder: Path) -> Path:
    """Where the index of `folder` by this model is kept: another one for other weights, and for weights of 8 bits."""
    digest = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=16)
    state = predictor.model.state_dict()
    for name in sorted(state):
        digest.update(name.encode())
        for part in _parts(state[name]):
            digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return cache_folder() / "images" / f"{digest.hexdigest()}.safetensors"


def _parts(tensor: Tensor) -> list[Tensor]:
    """Of a quantised tensor those that it is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def _stamp(path: Path) -> Stamp | None:
    """None: there is no such file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def _read(file: Path) -> dict[str, tuple[Stamp, Tensor]]:
    with safe_open(file, "pt") as stored:
        told = stored.metadata()
        if told["version"] != _VERSION:
            raise ValueError(f"version {told['version']}")
        names: list[str] = json.loads(told["names"])
        stamps = [(int(size), int(changed)) for size, changed in stored.get_tensor("stamps").tolist()]
        embeddings = stored.get_tensor("embeddings").float() if names else torch.empty(0, 0)
    return {name: (stamp, row) for name, stamp, row in zip(names, stamps, embeddings, strict=True)}
