"""One record of a shard: an image with its texts, found by byte offset in a plain tar and checked.

Three forms are read as they are: our own (`KEY.jpg` + `KEY.json`), img2dataset's (`KEY.jpg` + `KEY.txt` + its own `KEY.json`), and
`KEY.jpg` + `KEY.txt`.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext

from vlm.data.headers import Member, plain_members
from vlm.data.prefetch import Prefetcher
from vlm.data.questions import read_questions
from vlm.data.remote import RemoteShard, UnreadableShard
from vlm.data.whole_texts import texts_are_whole
from vlm.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_OPEN_FILES = 128
MAX_RECORD, MAX_TEXT, MAX_HEADER = 2**28, 2**24, 2**15  # bytes; JSON takes many times its size in memory
META = re.compile(r"__[^/]*__($|/)")  # what webdataset keeps for itself
UNREADABLE = "unreadable shard"
Location = str | Path | RemoteShard


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

    image: the encoded bytes. captions: non-empty strings. questions: as `read_questions` gives them. image_id: signed 64-bit hash of "source/id",
    equal for equal images; name: that id as the record gives it, or the key. At least one caption or question is present, unless bare ones were asked
    for. synthetic: those of the captions that a model made.
    """

    source: str
    key: str
    image: bytes
    captions: list[str]
    questions: list[dict[str, Any]]
    image_id: int
    name: int | str = ""
    synthetic: list[str] = field(default_factory=list)


def image_hash(source: str, image_id: int | str) -> int:
    """The signed 64-bit number of an image: blake2b of "source/id"."""
    name = f"{source}/{image_id}".encode(errors="surrogateescape")  # tars may hold names that are not UTF-8
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def extension_of(image: bytes) -> str:
    """The extension of a record's image by its first bytes: png, webp, else jpg."""
    return {b"\x89PNG": "png", b"RIFF": "webp"}.get(image[:4], "jpg")


def parse_record(source: str, key: str, members: dict[str, bytes], bare: bool = False) -> Record:
    """A record from its files, `members`: extension -> bytes. bare: it needs no text. Raises BadRecord with the cause."""
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
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise BadRecord("broken json", f'{name}: "captions" is not a list of strings.')
    try:
        questions = read_questions(fields.get("questions"), key)
    except ValueError as error:
        raise BadRecord("broken json", f"{name}: {error}") from None
    captions = [c.strip() for c in captions if c.strip()]
    if not captions and not questions and not bare:
        raise BadRecord("no text", f"{name} has neither a caption nor a question.")
    given = fields.get("image_id")
    image_name = key if given is None else given
    marked = fields.get("synthetic")
    synthetic = [c for c in captions if c in marked] if isinstance(marked, list) else []
    return Record(source, key, image, captions, questions, image_hash(source, image_name), image_name, synthetic)


def _decode(name: str, data: bytes) -> str:
    if len(data) > MAX_TEXT:
        raise BadRecord("too large", f"{name}: its text has {len(data)} bytes, at most {MAX_TEXT} are read.")
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
    if "\\ud" in text.lower() and not texts_are_whole(text):
        raise BadRecord("not UTF-8", f"{name}: its .json holds an unpaired surrogate.")
    return fields


def member_key(name: str) -> tuple[str, str] | None:
    """Key and extension of a file in a tar: all up to the first dot of its last part, and the rest; None where webdataset passes it over."""
    key, extension = base_plus_ext(name)
    if key is None or META.match(name):
        return None
    return str(key), str(extension).lower()


def scan_shard(path: str | Path | int) -> tuple["array[int]", str | None]:
    """Where the records of a plain tar (a path, or an open file's descriptor) begin, from its headers alone.

    Returns n + 1 byte offsets, the last being the end of the last whole record, and, for a shard that is cut short or damaged, what is wrong. Raises
    OSError where it cannot be opened.
    """
    starts: array[int] = array("q")
    end, key, damage = 0, None, None
    with _Headers(path, closefd=not isinstance(path, int)) as file:
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as tar:
                for member in _members(tar):
                    name = member_key(member.name) if member.isreg() else None
                    if name is not None and name[0] != key:
                        starts.append(member.offset)
                        key = name[0]
                    end = tar.offset
            damage = _ending(file, end)
        except Exception as error:  # tarfile raises whatever a header's damage leads to
            damage = str(error) or type(error).__name__
    if damage and starts:
        # what was read last may lack its data, or other files of the same record
        end = starts.pop()
    starts.append(end)
    return starts, damage


class _Headers(io.FileIO):
    """A tar whose headers alone are read: one that claims to be larger is damage, not to be held in memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        if tar.offset <= member.offset:  # a negative size would lead back, for ever
            raise tarfile.ReadError(f"invalid header at byte {member.offset}")
        # a shard may hold many; tarfile would keep them all
        tar.members = []  # type: ignore[attr-defined]
        yield member


def _ending(file: _Headers, end: int) -> str | None:
    """What is wrong with a tar whose last readable file ends at byte `end`: tarfile itself takes a damaged header for the end."""
    size = file.seek(0, os.SEEK_END)
    file.seek(end)
    block = file.read(512)
    if end > size or 0 < len(block) < 512:
        return f"unexpected end of data at byte {size}"
    return f"invalid header at byte {end}" if block.strip(b"\0") else None


def _split_members(data: bytes) -> tuple[str, dict[str, bytes]] | None:
    """The key and the files of the record whose bytes, headers included, these are; nothing is unpacked to a disk."""
    key: str | None = None
    members: dict[str, bytes] = {}
    for file, start, size in plain_members(data) or _regular_files(data):
        name = member_key(file)
        if name is not None and key in (None, name[0]):
            key = name[0]
            # of two files of one name the first counts, as for webdataset
            members.setdefault(name[1], data[start : start + size])
    return None if key is None else (key, members)


def _regular_files(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(m.name, m.offset_data, m.size) for m in _members(tar) if m.isreg() and not m.issparse()]


class ShardReader:
    """Reads any record of shards by its number; remembers offsets and what cannot be read, and keeps some local files open. One to a process."""

    def __init__(self, bare: bool = False) -> None:
        """bare: records without a text are read too."""
        self._bare = bare
        self._offsets: OrderedDict[Location, array[int]] = OrderedDict()
        self._files: OrderedDict[Location, int] = OrderedDict()
        self._unreadable: dict[Location, str] = {}
        self._ahead = Prefetcher()

    def read(self, shard: Location, source: str, number: int) -> Record:
        """Record `number` of a shard (`ShardSet.locate`).

        Raises BadRecord: with the cause "missing" where the shard ends before it, "unreadable shard" where that cannot be opened or fetched, which is
        tried once in the reader's life.
        """
        if shard in self._unreadable:
            raise BadRecord(UNREADABLE, self._unreadable[shard])
        with self._remembering(shard), self._opened(shard) as file:
            data = self._part(shard, file, number)
        if shard in self._unreadable:
            raise BadRecord(UNREADABLE, self._unreadable[shard])
        try:
            found = _split_members(data)
        except Exception:  # as in scan_shard
            found = None
        if found is None:
            raise BadRecord("missing", f"{shard}: record {number} cannot be read.")
        key, members = found
        return parse_record(source, key.removeprefix("./"), members, self._bare)

    def count(self, shard: Location) -> int:
        """The whole records of a shard; 0 where it cannot be read, which `read` then says."""
        held = 0
        if shard not in self._unreadable:
            with self._remembering(shard), self._opened(shard) as file:
                held = len(self._starts(shard, file)) - 1
        return held

    def fetch_ahead(self, shard: Location) -> None:
        """Fetches a remote shard in the background; what goes wrong there is said when the shard is read."""
        if isinstance(shard, RemoteShard) and shard not in self._unreadable:
            self._ahead.want(shard)

    @contextmanager
    def _remembering(self, shard: Location) -> Iterator[None]:
        """Remembers that a shard cannot be read."""
        try:
            yield
        except UnreadableShard as error:
            self._unreadable[shard] = str(error)
        except OSError as error:
            self._unreadable[shard] = f"{shard} cannot be read: {error.strerror or error}."

    @contextmanager
    def _opened(self, shard: Location) -> Iterator[int]:
        if isinstance(shard, RemoteShard):  # not kept open: the cache could not free its room
            self._ahead.wait(shard)
            file = shard.open()
            try:
                yield file
            finally:
                os.close(file)
            return
        if shard not in self._files:
            self._files[shard] = os.open(shard, os.O_RDONLY)
            if len(self._files) > MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        yield self._files[shard]

    def _starts(self, shard: Location, file: int) -> "array[int]":
        offsets = self._offsets.get(shard)
        if offsets is None:
            offsets = self._offsets[shard] = scan_shard(file)[0]
            if len(self._offsets) > 4096:
                self._offsets.popitem(last=False)
        return offsets

    def _part(self, shard: Location, file: int, number: int) -> bytes:
        offsets = self._starts(shard, file)
        if number >= len(offsets) - 1:
            raise BadRecord(
                "missing",
                f"{shard} holds {len(offsets) - 1} whole records, number {number} was expected; it is cut short or was changed.",
            )
        start, stop = offsets[number], offsets[number + 1]
        if stop - start > MAX_RECORD:
            raise BadRecord(
                "too large", f"{shard}: record {number} has {stop - start} bytes, at most {MAX_RECORD} are read."
            )
        return os.pread(file, stop - start, start)

    def close(self) -> None:
        """Closes the files and gives up what was to be fetched; the reader opens them again when it is used."""
        self._ahead.close()
        while self._files:
            os.close(self._files.popitem()[1])
