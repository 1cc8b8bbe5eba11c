"""Files written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write beside `path`, which takes its name at the end; where anything fails it is removed, and what was there stays.

    Raises:
        UserError: OSError on the way, for example a full disk or a folder that is not writable.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield new
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> UserError:
    """What to say of it."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}); free space, or choose another folder.")


def replace_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8, and the folders above it. Half characters, which stand for bytes of a file's name that are not UTF-8, become escapes
    (`\\udce9`); in JSON these are read as what they were.

    Raises:
        UserError: it cannot be written; what was there stays.
    """
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """As `replace_text`."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_figure(figure: Any, path: Path, dpi: int) -> None:
    """A figure of matplotlib's as a picture of the kind that the path's ending says, PNG where it has none.

    Raises:
        UserError: it cannot be written, or matplotlib does not write that kind.
    """
    try:
        with replacing(path) as new:
            figure.savefig(new, dpi=dpi, format=path.suffix[1:] or "png")
    except ValueError as error:
        raise UserError(f"{path}: the picture cannot be written ({error}); give --out NAME.png.") from None
