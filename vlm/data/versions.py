"""Which content of an address some bytes are of, as far as the other side says, and the note of it that lies beside a copy: `DIGEST.json`.

Without it a download that goes on after a break could join two contents that the address had one after the other.
"""

import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Version:
    """What tells one content of an address from another.

    tag: an HTTP ETag as it came, or what a file system says that changes with the content. date: Last-Modified as it came. total: how many bytes the
    whole has. condition: that of the two which stands for these very bytes, so that the rest may be asked for on condition that it holds.
    """

    tag: str | None = None
    date: str | None = None
    total: int | None = None
    condition: str | None = None

    def agrees(self, other: "Version") -> bool:
        """Whether nothing says that the other is another content; a server may forget a strong tag or change the date of equal bytes."""
        pairs = [(self.total, other.total), (_opaque(self.tag), _opaque(other.tag))]
        if self.condition is None or self.condition != other.tag:
            pairs.append((self.date, other.date))
        return all(a is None or b is None or a == b for a, b in pairs)


def _opaque(tag: str | None) -> str | None:
    return None if tag is None else tag.removeprefix("W/")


@dataclass(frozen=True)
class Note:
    """What is known of a copy, or of the part of one.

    asked: when (`time.time`) the other side last said that the copy is of what it has. damage: what is wrong with a copy that never came better.
    """

    version: Version
    asked: float = 0.0
    damage: str | None = None

    def save(self, path: Path) -> None:
        """Replaces the note there. Raises OSError."""
        new = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")  # threads open shards too
        new.write_text(json.dumps(asdict(self)))
        os.replace(new, path)


def load_note(path: Path) -> Note | None:
    """The note there; None where there is none that can be used."""
    try:
        content = json.loads(path.read_bytes())
        return Note(Version(**content["version"]), float(content["asked"]), content["damage"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
