"""Files that `vlm score` takes, and the table that it prints."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm.errors import UserError


def read_json(path: Path | str, form: str) -> Any:
    """The content of a JSON file, UTF-8 with or without a mark. Raises UserError, naming the file and the form expected."""
    text = _text(path, form)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); expected {form}.") from None


def read_records(path: Path | str, key: str, form: str) -> list[dict[str, Any]]:
    """The records of a file that is their list, has it below `key`, or has one record a line. Raises UserError as `read_json`."""
    text = _text(path, form)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise UserError(f"{path}: not JSON, nor JSON a line ({error}); expected {form}.") from None
    if isinstance(content, dict):
        content = content.get(key, [content])  # a single line is an object too
    return records(content, None, path, form)


def records(content: Any, key: str | None, path: Path | str, form: str) -> list[dict[str, Any]]:
    """The list of records in a file's content, below `key` where the form has one. Raises UserError for another form."""
    if key is not None:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise UserError(f"{path}: not of the expected form {form}.")
    return content


def format_scores(scores: Mapping[str, Any]) -> str:
    """A table for people: accuracies and recalls, which are in percent, with two digits, caption metrics with four."""
    digits = 2 if "overall" in scores or "mean_R@1" in scores else 4
    rows = list(_rows(scores, ""))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(name if value is None else f"{name:<{width}}{_cell(value, digits)}" for name, value in rows)


def _rows(scores: Mapping[str, Any], indent: str) -> Iterator[tuple[str, float | None]]:
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield indent + name, None
            yield from _rows(value, indent + "  ")
        else:
            yield indent + name, value


def _cell(value: float, digits: int) -> str:
    return f"{value:>{digits + 4}}" if isinstance(value, int) else f"{value:>{digits + 4}.{digits}f}"


def _text(path: Path | str, form: str) -> str:
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a JSON file of the form {form}.") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected a JSON file of the form {form}."
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); expected {form}.") from None
