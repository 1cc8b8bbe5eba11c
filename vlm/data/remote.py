"""Shards that lie elsewhere: copies in a cache of bounded size, shared by all processes of a machine.

A shard is downloaded whole at its first use, as its records are read in no order. `DIGEST.tar.part` is the download, held by a file lock; it becomes
`DIGEST.tar` by one rename, so that a copy is whole or not there, and what an interrupted download leaves is taken up by the next one. `DIGEST.json`
notes of which version either is.
"""

import fcntl
import hashlib
import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from vlm.config import CacheConfig
from vlm.data.copies import is_still, lock_part, make_room, note_of
from vlm.data.transport import Head, Interrupted, Refused, holds, receive
from vlm.data.versions import Note, Version, load_note
from vlm.errors import ConfigError, UserError

log = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts, doubled each time
SMALL_FILE = 2**26  # bytes; an index of a hundred thousand shards has 10 MB
STARTED = time.time()  # what was fetched or asked after since then is not asked after again


class UnreadableShard(UserError):
    """A shard that cannot be had, after all attempts."""


@dataclass(frozen=True)
class RemoteShard:
    """Where a shard is fetched: its address, its size (0: not known), and the cache that its copy is kept in."""

    url: str
    bytes: int
    cache: CacheConfig

    def __str__(self) -> str:
        return self.url

    @property
    def digest(self) -> str:
        """What its files in the cache are called."""
        return hashlib.blake2b(f"{self.bytes} {self.url}".encode(), digest_size=16).hexdigest()

    def open(self) -> int:
        """A file descriptor of the whole copy, which is downloaded if need be.

        Raises UnreadableShard after the last attempt, and ConfigError where the cache cannot be written or is too small.
        """
        path = cache_folder(self.cache) / f"{self.digest}.tar"
        try:
            while True:
                copy = _open_copy(self, path)
                if copy is None:
                    copy = _fetch(self, path)
                if copy is not None:
                    return copy
        except OSError as error:
            raise ConfigError(
                f"the cache {path.parent} cannot be used: {error.strerror or error}; free some space, lower data.cache.gigabytes, "
                "or choose another data.cache.folder."
            ) from None


def is_remote(location: str) -> bool:
    return "://" in location or location.startswith("pipe:")


def cache_folder(cache: CacheConfig) -> Path:
    """The folder of the copies; by default below $XDG_CACHE_HOME or ~/.cache."""
    if cache.folder is not None:
        return Path(cache.folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm" / "shards"


def read_small(url: str, cache: CacheConfig) -> bytes:
    """The content of a small file, an index. Raises Refused, and Interrupted after the last attempt."""
    for attempt in range(cache.retries + 1):
        data, total = bytearray(), None
        try:
            for item in receive(url, 0, Version(), cache.timeout):
                if isinstance(item, Head):
                    total = item.version.total
                else:
                    data += item
                if max(len(data), total or 0) > SMALL_FILE:
                    raise Refused(f"more than {SMALL_FILE >> 20} MiB, which is no index")
            if total is None or len(data) == total:
                return bytes(data)
            raise Interrupted(f"it ended after {len(data)} of {total} bytes")
        except Interrupted as error:
            if attempt == cache.retries:
                raise
            time.sleep(_pause(attempt, error))
    raise AssertionError("unreachable")


def _open_copy(shard: RemoteShard, path: Path) -> int | None:
    """The copy, if it is there; one that is not what it should be is removed."""
    try:
        copy = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if _is_good(shard, path, os.fstat(copy).st_size):
            os.utime(copy)  # used now: the last to be removed
            return copy
        if is_still(path, copy):
            path.unlink(missing_ok=True)
    except BaseException:
        os.close(copy)
        raise
    os.close(copy)
    return None


def _is_good(shard: RemoteShard, path: Path, size: int) -> bool:
    """Whether a copy has the size that its index says; where none does: whether it is sound, and the same is there still, asked once in a run."""
    if shard.bytes:
        return size == shard.bytes
    note = load_note(note_of(path))
    if note is None:  # nobody looked whether it is whole
        return False
    if note.asked >= STARTED:
        return True
    if note.version != Version() or note.damage:
        try:
            same = holds(shard.url, replace(note.version, total=size), shard.cache.timeout)
        except (Refused, Interrupted) as error:
            log.warning("%s cannot be asked after (%s); its copy in the cache is read", shard, error)
        else:
            if note.damage:  # a sound one may come now
                return False
            if not same:
                log.warning("%s was replaced since it was copied; it is fetched again", shard)
                return False
    Note(note.version, time.time(), note.damage).save(note_of(path))
    return True


def _fetch(shard: RemoteShard, path: Path) -> int | None:
    """Downloads the copy; None where another process did so at the same time."""
    part = lock_part(path)
    if part is None:
        return None
    try:
        _download(shard, part, path.parent)
        os.fsync(part)
        os.rename(f"{path}.part", path)
        fcntl.flock(part, fcntl.LOCK_UN)
        make_room(path.parent, 0, limit(shard.cache))
    except BaseException:
        os.close(part)
        raise
    return part


def limit(cache: CacheConfig) -> int:
    """Bytes that the cache may hold."""
    return int(cache.gigabytes * 10**9)


@dataclass
class _Part:
    """A download on its way: the file, where its version is noted, how many bytes it has and shall have, and the version that they are of."""

    file: int
    note: Path
    size: int
    total: int | None
    version: Version


def _download(shard: RemoteShard, file: int, folder: Path) -> None:
    """Completes the part `file`; goes on where an attempt broke off, and counts only the attempts in a row that bring nothing new."""
    part = _taken_up(shard, file, folder / f"{shard.digest}.json")
    furthest, attempt = part.size, 0
    while True:
        try:
            if part.size == 0 or part.size != part.total:
                _attempt(shard, part, folder)
            if part.total not in (None, part.size):
                raise Interrupted(f"it ended after {part.size} of {part.total} bytes")
            damage = None if shard.bytes else _damage(part)
            if damage and attempt < shard.cache.retries:
                raise Interrupted(f"what came is damaged: {damage}", restart=True)
            if damage:
                log.warning("%s is damaged (%s): in this run its records before that are read", shard, damage)
            Note(part.version, time.time(), damage).save(part.note)
            return
        except Refused as error:
            raise UnreadableShard(f"{shard} cannot be read: {error}.") from None
        except Interrupted as error:
            if part.size > furthest:
                furthest, attempt = part.size, 0
            if error.restart:
                _cut(part, 0)
            if attempt == shard.cache.retries:
                raise UnreadableShard(f"{shard} cannot be read, {attempt + 1} attempts failed: {error}.") from None
            pause = _pause(attempt, error)
            log.warning("%s: %s; trying again in %.1f s", shard, error, pause)
            time.sleep(pause)
            attempt += 1


def _taken_up(shard: RemoteShard, file: int, path: Path) -> _Part:
    """The part as an earlier download left it, emptied where nobody noted of which version it is."""
    note = load_note(path)
    version = note.version if note else Version()
    part = _Part(file, path, os.fstat(file).st_size, shard.bytes or version.total, version)
    if note is None:
        _cut(part, 0)
    return part


def _damage(part: _Part) -> str | None:
    """What is wrong with a whole download whose size nobody knew before. Raises Interrupted where not one record of it can be read."""
    from vlm.data.records import scan_shard  # that module reads this one's shards

    starts, damage = scan_shard(part.file)
    os.lseek(part.file, 0, os.SEEK_SET)  # it is handed on as a file just opened
    if damage and len(starts) == 1:
        head = os.pread(part.file, 32, 0)
        raise Interrupted(f"{part.size} bytes came that are no tar ({damage}); they begin with {head!r}", restart=True)
    return damage


def _attempt(shard: RemoteShard, part: _Part, folder: Path) -> None:
    for item in receive(shard.url, part.size, part.version, shard.cache.timeout):
        if isinstance(item, Head):
            if shard.bytes and item.version.total not in (None, shard.bytes):
                raise Refused(f"it has {item.version.total} bytes, its index says {shard.bytes}; make the index anew")
            if item.start == 0:  # else the rest of what is there
                _cut(part, 0)
                part.version, part.total = item.version, shard.bytes or item.version.total
                Note(part.version).save(part.note)  # before the first byte of it
            _reserve(shard, part, folder)
            continue
        most = part.total if part.total is not None else limit(shard.cache)
        if part.size + len(item) > most:
            _cut(part, 0)
            raise Refused(f"it sends more than the {most} bytes that were expected")
        _write(part, item)


def _reserve(shard: RemoteShard, part: _Part, folder: Path) -> None:
    need = part.total or 0
    if need > limit(shard.cache):
        raise ConfigError(
            f"{shard} has {need / 1e9:.3g} GB, data.cache.gigabytes={shard.cache.gigabytes:g}; it must hold at least one shard "
            "for each of data.streams."
        )
    make_room(folder, need - part.size, limit(shard.cache))


def _write(part: _Part, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(part.file, rest, part.size)
        rest = rest[written:]
        part.size += written


def _cut(part: _Part, size: int) -> None:
    os.ftruncate(part.file, size)
    part.size = size


def _pause(attempt: int, error: Interrupted) -> float:
    return max(error.wait, min(FIRST_PAUSE * float(2**attempt), LONGEST_PAUSE))
