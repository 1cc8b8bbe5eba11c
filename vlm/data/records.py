"""One record of a shard: an image with its texts, found by byte offset in a plain tar and checked.

Three forms are read as they are: our own (`KEY.jpg` + `KEY.json`), img2dataset's (`KEY.jpg` + `KEY.txt` + its own `KEY.json`), and
`KEY.jpg` + `KEY.txt`.
"""

import hashlib
import io
import json
import os
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.handlers import ignore_and_continue
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from vlm.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_OPEN_FILES = 128


class BadRecord(UserError):
    """A record that cannot be used; `cause` is a short name under which it is counted."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # exceptions rebuild themselves from `args`, which lacks the cause; this one crosses process borders
        return type(self), (self.cause, str(self))


@dataclass
class Record:
    """One image with its texts.

    image: the encoded bytes. captions: non-empty strings. questions: dicts with at least "question" (and "question_id", "answers"). image_id: signed
    64-bit hash of "source/id", equal for equal images; name: that id as the record gives it, or the key. At least one caption or question is present.
    """

    source: str
    key: str
    image: bytes
    captions: list[str]
    questions: list[dict[str, Any]]
    image_id: int
    name: int | str = ""


def image_hash(source: str, image_id: int | str) -> int:
    """The signed 64-bit number of an image: blake2b of "source/id"."""
    name = f"{source}/{image_id}".encode(errors="surrogateescape")  # tars may hold names that are not UTF-8
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def extension_of(image: bytes) -> str:
    """The extension of a record's image by its first bytes: png, webp, else jpg."""
    return {b"\x89PNG": "png", b"RIFF": "webp"}.get(image[:4], "jpg")


def parse_record(source: str, key: str, members: dict[str, bytes]) -> Record:
    """A record from its files, `members`: extension -> bytes. Raises BadRecord with the cause."""
    name = f"{source}/{key}"
    image = next((members[e] for e in IMAGE_EXTENSIONS if members.get(e)), None)
    if image is None:
        raise BadRecord(
            "no image", f"{name} has no image; expected one of .{', .'.join(IMAGE_EXTENSIONS)}, got {sorted(members)}."
        )
    fields = _parse_json(name, members["json"]) if "json" in members else {}
    captions = fields.get("captions")
    if captions is None:  # img2dataset repeats the .txt in its json's "caption"; that one serves where there is no .txt
        captions = [_decode(name, members["txt"])] if "txt" in members else [fields.get("caption") or ""]
    questions = fields.get("questions") or []
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise BadRecord("broken json", f'{name}: "captions" is not a list of strings.')
    if not isinstance(questions, list) or not all(
        isinstance(q, dict) and isinstance(q.get("question"), str) for q in questions
    ):
        raise BadRecord("broken json", f'{name}: "questions" is not a list of objects with a "question".')
    captions = [c.strip() for c in captions if c.strip()]
    if not captions and not questions:
        raise BadRecord("no text", f"{name} has neither a caption nor a question.")
    given = fields.get("image_id")
    image_name = key if given is None else given
    return Record(source, key, image, captions, questions, image_hash(source, image_name), image_name)


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"{name}: its text is not UTF-8 (byte {error.start}).") from None


def _parse_json(name: str, data: bytes) -> dict[str, Any]:
    text = _decode(name, data)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord("broken json", f"{name}: its .json cannot be read ({error}).") from None
    if not isinstance(fields, dict):
        raise BadRecord("broken json", f"{name}: its .json is not an object.")
    if "\\ud" in text.lower():  # half of an escaped pair is no character: tokenizers and files would refuse it later
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRecord("not UTF-8", f"{name}: its .json holds an unpaired surrogate.") from None
    return fields


def member_key(name: str) -> str | None:
    """The key of a file in a tar (all up to the first dot of its last part), or None where webdataset passes it over."""
    key: str | None = base_plus_ext(name)[0]
    return key


def scan_shard(path: str | Path) -> tuple["array[int]", str | None]:
    """Where the records of a plain tar begin, from its headers alone.

    Returns n + 1 byte offsets, the last being the end of the last whole record, and, for a shard that is cut short or damaged, what is wrong.
    """
    starts: array[int] = array("q")
    end, key, damage = 0, None, None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar):
                name = member_key(member.name) if member.isreg() else None
                if name is not None and name != key:
                    starts.append(member.offset)
                    key = name
                end = member.offset_data + (member.size + 511) // 512 * 512
        damage = _ending(path, end)
    except (tarfile.TarError, OSError) as error:
        damage = str(error)
    if damage and starts:
        # what was read last may lack its data, or other files of the same record
        end = starts.pop()
    starts.append(end)
    return starts, damage


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        # a shard may hold many; tarfile would keep them all
        tar.members = []  # type: ignore[attr-defined]
        yield member


def _ending(path: str | Path, end: int) -> str | None:
    """What is wrong with a tar whose last readable file ends at byte `end`: tarfile itself takes a damaged header for the end."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        size = file.tell()
        file.seek(end)
        block = file.read(512)
    if end > size or 0 < len(block) < 512:
        return f"unexpected end of data at byte {size}"
    return f"invalid header at byte {end}" if block.strip(b"\0") else None


class ShardReader:
    """Reads any record of local shards by its number; remembers offsets and keeps some files open. One to a process."""

    def __init__(self) -> None:
        self._offsets: OrderedDict[str | Path, array[int]] = OrderedDict()
        self._files: OrderedDict[str | Path, int] = OrderedDict()

    def read(self, path: str | Path, source: str, number: int) -> Record:
        """Record `number` of the shard at `path`. Raises BadRecord, with "missing" as cause where the shard ends before it."""
        offsets = self._offsets.get(path)
        if offsets is None:
            offsets = self._offsets[path] = scan_shard(path)[0]
            if len(self._offsets) > 4096:
                self._offsets.popitem(last=False)
        if number >= len(offsets) - 1:
            raise BadRecord(
                "missing",
                f"{path} holds {len(offsets) - 1} whole records, number {number} was expected; it is cut short or was changed.",
            )
        start, stop = offsets[number], offsets[number + 1]
        try:
            data = os.pread(self._open(path), stop - start, start)
        except OSError as error:
            raise BadRecord("missing", f"{path} cannot be read: {error.strerror}.") from None
        files = tar_file_expander([{"url": str(path), "stream": io.BytesIO(data)}], handler=ignore_and_continue)
        for sample in group_by_keys(files, handler=ignore_and_continue):
            members = {name: value for name, value in sample.items() if not name.startswith("__")}
            return parse_record(source, sample["__key__"].removeprefix("./"), members)
        raise BadRecord("missing", f"{path}: record {number} cannot be read.")

    def _open(self, path: str | Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
            if len(self._files) > MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return self._files[path]

    def close(self) -> None:
        """Closes the files; the reader opens them again when it is used."""
        while self._files:
            os.close(self._files.popitem()[1])
