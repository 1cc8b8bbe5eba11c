"""Shards that lie elsewhere: copies in a cache of bounded size, shared by all processes of a machine.

A shard is downloaded whole at its first use, as its records are read in no order. `DIGEST.tar.part` is the download, held by a file lock; it becomes
`DIGEST.tar` by one rename, so that a copy is whole or not there, and what an interrupted download leaves is taken up by the next one.
"""

import fcntl
import hashlib
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from vlm.config import CacheConfig
from vlm.data.transport import Head, Interrupted, Refused, receive
from vlm.errors import ConfigError, UserError

log = logging.getLogger(__name__)
OURS = re.compile(r"[0-9a-f]{32}\.tar(\.part)?")
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts, doubled each time
PROGRESS = 2**20  # bytes that an attempt must add, so that those which failed are forgotten
SMALL_FILE = 2**26  # bytes; an index of a hundred thousand shards has 10 MB


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

    def open(self) -> int:
        """A file descriptor of the whole copy, which is downloaded if need be.

        Raises UnreadableShard after the last attempt, and ConfigError where the cache cannot be written or is too small.
        """
        digest = hashlib.blake2b(f"{self.bytes} {self.url}".encode(), digest_size=16).hexdigest()
        path = cache_folder(self.cache) / f"{digest}.tar"
        try:
            while True:
                copy = _open_copy(path, self.bytes)
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
            for item in receive(url, 0, None, cache.timeout):
                if isinstance(item, Head):
                    total = item.total
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


def make_room(folder: Path, need: int, cache: CacheConfig) -> None:
    """Removes the copies (and abandoned parts) used longest ago, until `need` more bytes fit into the cache."""
    found = []
    for entry in os.scandir(folder):
        try:
            if OURS.fullmatch(entry.name):
                status = entry.stat(follow_symlinks=False)
                found.append((status.st_mtime, status.st_size, entry.path))
        except FileNotFoundError:  # another process makes room too
            continue
    excess = sum(size for _, size, _ in found) + need - limit(cache)
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        if not path.endswith(".part"):
            Path(path).unlink(missing_ok=True)
            excess -= size
        elif _remove_part(path):
            excess -= size


def _open_copy(path: Path, size: int) -> int | None:
    """The copy, if it is there; one of another size than it should have is removed."""
    try:
        copy = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if size in (0, os.fstat(copy).st_size):
        os.utime(copy)  # used now: the last to be removed
        return copy
    os.close(copy)
    path.unlink(missing_ok=True)
    return None


def _fetch(shard: RemoteShard, path: Path) -> int | None:
    """Downloads the copy; None where another process did so at the same time."""
    part = _lock_part(path)
    if part is None:
        return None
    try:
        _download(shard, part, path.parent)
        os.fsync(part)
        os.rename(f"{path}.part", path)
        fcntl.flock(part, fcntl.LOCK_UN)
        make_room(path.parent, 0, shard.cache)
    except BaseException:
        os.close(part)
        raise
    return part


def limit(cache: CacheConfig) -> int:
    """Bytes that the cache may hold."""
    return int(cache.gigabytes * 10**9)


def _lock_part(path: Path) -> int | None:
    """The part of a copy, locked for this process; None where the copy is there when the lock is had."""
    name = f"{path}.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        part = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        fcntl.flock(part, fcntl.LOCK_EX)
        if _is_still(name, part):
            return part
        os.close(part)  # it was finished, or removed, while this process waited
    return None


def _is_still(name: str, file: int) -> bool:
    try:
        return os.stat(name).st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False


def _remove_part(name: str) -> bool:
    """Removes a part that no process is writing."""
    try:
        part = os.open(name, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_still(name, part):
            os.unlink(name)
        return True
    except OSError:
        return False
    finally:
        os.close(part)


@dataclass
class _Part:
    """A download on its way: the file, how many bytes it has and shall have, and the tag of the content that they are of."""

    file: int
    size: int
    total: int | None = None
    tag: str | None = None


def _download(shard: RemoteShard, file: int, folder: Path) -> None:
    """Completes the part `file`; goes on where an attempt broke off, and counts only the attempts that bring nothing new."""
    part = _Part(file, os.fstat(file).st_size, shard.bytes or None)
    furthest, attempt = part.size, 0
    while part.total is None or part.size != part.total:
        try:
            _attempt(shard, part, folder)
            if part.total in (None, part.size):
                return
            raise Interrupted(f"it ended after {part.size} of {part.total} bytes")
        except Refused as error:
            raise UnreadableShard(f"{shard} cannot be read: {error}.") from None
        except Interrupted as error:
            if error.restart:
                _cut(part, 0)
            if part.size >= furthest + PROGRESS:
                furthest, attempt = part.size, 0
            if attempt == shard.cache.retries:
                raise UnreadableShard(f"{shard} cannot be read, {attempt + 1} attempts failed: {error}.") from None
            pause = _pause(attempt, error)
            log.warning("%s: %s; trying again in %.1f s", shard, error, pause)
            time.sleep(pause)
            attempt += 1


def _attempt(shard: RemoteShard, part: _Part, folder: Path) -> None:
    for item in receive(shard.url, part.size, part.tag, shard.cache.timeout):
        if isinstance(item, Head):
            if item.start != part.size:
                _cut(part, item.start)
            part.tag, part.total = item.tag, shard.bytes or item.total
            if shard.bytes and item.total not in (None, shard.bytes):
                raise Refused(f"it has {item.total} bytes, its index says {shard.bytes}; make the index anew")
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
    make_room(folder, need - part.size, shard.cache)


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
