"""Writing shards: plain tar files of records with an `index.json`, through webdataset. Reading is in records.py, counting in index.py."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import webdataset

from vlm.data.index import MADE_BY, REPLACING, ShardInfo, ShardSet, index_content, is_ours, load_index, write_index
from vlm.data.places import check_source
from vlm.data.records import IMAGE_EXTENSIONS, BadRecord, Record, ShardReader, image_hash
from vlm.data.whole_texts import texts_are_whole
from vlm.errors import UserError
from vlm.files import write_json

__all__ = [
    "MADE_BY",
    "BadRecord",
    "Record",
    "ShardInfo",
    "ShardReader",
    "ShardSet",
    "ShardWriter",
    "image_hash",
    "load_index",
    "write_index",
]


class ShardWriter:
    """Writes records into shards; a context manager.

    `with ShardWriter(folder, "flickr8k") as writer: writer.write(key, image, captions=[...])`. Everything goes to a temporary folder beside `folder`
    and takes its place when the block ends well, replacing shards written there before; after an exception nothing that was there is touched.
    """

    def __init__(self, folder: str | Path, source: str, samples_per_shard: int = 1000) -> None:
        self.folder, self.source, self.samples_per_shard = Path(folder).absolute(), source, samples_per_shard
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard={samples_per_shard}; expected at least 1.")
        check_source(source)
        self._keys: set[str] = set()
        self._shards: list[ShardInfo] = []
        self._file: IO[bytes] | None = None
        self._tar: Any = None
        self._in_shard = 0
        # a fixed name, so that what a killed run left is cleared by the next one
        self._temporary = self.folder.with_name(f".{self.folder.name}.writing")

    def check(self) -> None:
        """Raises UserError where the folder holds tar files of others: for long work that wants to know before it begins."""
        tars = sorted(p.name for p in self.folder.glob("*.tar"))
        if tars and not (self.folder / REPLACING).exists() and not is_ours(self.folder, tars):
            raise UserError(
                f"{self.folder} holds tar files that ShardWriter did not write ({len(tars)}, first {tars[0]}); choose another folder."
            )

    def __enter__(self) -> Self:
        self.check()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        return self

    def free_key(self, key: str) -> str:
        """`key` as `write` takes it: "_" for what it cannot hold, and a number behind it where another record has it."""
        key = key.replace(".", "_").replace("/", "_") or "_"
        free, number = key, 1
        while free in self._keys:
            number += 1
            free = f"{key}_{number}"
        return free

    def write(
        self,
        key: str,
        image: bytes,
        extension: str = "jpg",
        captions: Sequence[str] = (),
        questions: Sequence[dict[str, Any]] = (),
        image_id: int | str | None = None,
        synthetic: Sequence[str] = (),
    ) -> None:
        """Adds one image with its texts. `image` is stored as it is, not decoded. synthetic: those of the captions that a model made.

        Raises UserError for an unusable key or extension, or no text.
        """
        extension = extension.lower().lstrip(".")
        if not key or "." in key or "/" in key:
            raise UserError(f"key {key!r}: expected a name without '.' and '/'; replace them, for example by '_'.")
        if key in self._keys:
            raise UserError(f"key {key!r} was written before; keys must be unique within a set of shards.")
        if extension not in IMAGE_EXTENSIONS:
            raise UserError(
                f"{key}: extension {extension!r}; expected one of {', '.join(IMAGE_EXTENSIONS)}. Convert the image first."
            )
        if not image or not (any(c.strip() for c in captions) or questions):
            raise UserError(f"{key}: a record needs a non-empty image and a caption or a question; leave it out.")
        fields: dict[str, Any] = {}
        if captions:
            fields["captions"] = list(captions)
        if questions:
            fields["questions"] = list(questions)
        if image_id is not None:
            fields["image_id"] = image_id
        if synthetic:
            fields["synthetic"] = list(synthetic)
        # bytes of a name that are not UTF-8 are half characters, and these are written as JSON's own escapes
        text = json.dumps(fields, ensure_ascii=False).encode(errors="backslashreplace")
        if b"\\ud" in text and not texts_are_whole(text.decode()):
            raise UserError(
                f"{key}: its texts hold half a character (an unpaired surrogate); mend them or leave the record out."
            )
        try:
            self._open_shard().write({"__key__": key, extension: image, "json": text})
            self._keys.add(key)
            self._in_shard += 1
            if self._in_shard == self.samples_per_shard:
                self._close_shard()
        except OSError as error:
            raise _full(self.folder, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close_shard()
            if kind is None:
                content = index_content(self.source, self._shards) | {"made_by": MADE_BY}
                write_json(self._temporary / "index.json", content)
                self._put_in_place()
        except OSError as problem:
            if kind is None:
                raise _full(self.folder, problem) from problem
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _open_shard(self) -> Any:
        if self._tar is None:
            path = self._temporary / f"shard-{len(self._shards):06d}.tar"
            self._file = path.open("wb")
            self._tar = webdataset.TarWriter(
                self._file, encoder=False, mtime=0
            )  # a fixed time: equal content, equal bytes
        return self._tar

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        assert self._file is not None
        tar, self._tar = self._tar, None
        try:
            tar.close()
        finally:
            self._file.close()
        path = Path(self._file.name)
        self._shards.append(ShardInfo(path.name, self._in_shard, path.stat().st_size))
        self._in_shard = 0

    def _put_in_place(self) -> None:
        if not self.folder.exists():
            os.rename(self._temporary, self.folder)
            return
        # Replacing several files is not atomic: the mark makes readers refuse the folder if this is interrupted, and lets a new run repair it.
        (self.folder / REPLACING).touch()
        (self.folder / "index.json").unlink(missing_ok=True)
        for old in self.folder.glob("*.tar"):
            old.unlink()
        for path in sorted(self._temporary.glob("*.tar")):
            os.replace(path, self.folder / path.name)
        os.replace(self._temporary / "index.json", self.folder / "index.json")
        (self.folder / REPLACING).unlink()


def _full(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"the shards of {folder} cannot be written: {error.strerror or error}; free some space or choose another folder."
    )
