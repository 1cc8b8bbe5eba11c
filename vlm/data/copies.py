"""The files of the cache folder: `DIGEST.tar`, a copy; `DIGEST.tar.part`, one on its way, written under a lock; `DIGEST.json`, a note of either."""

import fcntl
import os
import re
from pathlib import Path

OURS = re.compile(r"[0-9a-f]{32}\.tar(\.part)?")


def note_of(path: Path) -> Path:
    """Where it is noted of which version a copy or its part is."""
    return path.with_name(path.name.partition(".")[0] + ".json")


def make_room(folder: Path, need: int, limit: int) -> None:
    """Removes the copies (and abandoned parts) used longest ago, until `need` more bytes fit: `limit` for all."""
    found = []
    for entry in os.scandir(folder):
        try:
            if OURS.fullmatch(entry.name):
                status = entry.stat(follow_symlinks=False)
                found.append((status.st_mtime, status.st_size, entry.path))
        except FileNotFoundError:  # another process makes room too
            continue
    excess = sum(size for _, size, _ in found) + need - limit
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        if not path.endswith(".part"):
            note_of(Path(path)).unlink(missing_ok=True)
            Path(path).unlink(missing_ok=True)
            excess -= size
        elif _remove_part(path):
            excess -= size


def lock_part(path: Path) -> int | None:
    """The part of a copy, locked for this process; None where the copy is there when the lock is had."""
    name = f"{path}.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        part = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        fcntl.flock(part, fcntl.LOCK_EX)
        if is_still(name, part):
            return part
        os.close(part)  # it was finished, or removed, while this process waited
    return None


def is_still(name: str | Path, file: int) -> bool:
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
        if is_still(name, part):
            note_of(Path(name)).unlink(missing_ok=True)
            os.unlink(name)
        return True
    except OSError:
        return False
    finally:
        os.close(part)
