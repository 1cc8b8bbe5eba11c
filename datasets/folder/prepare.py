"""One's own images with captions, or questions and answers, to shards. See README.md beside this file."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from vlm.data.prepare import LeftOut, Photograph, keyed_hash, read_lines, run, shard_key, write_splits
from vlm.data.references import question
from vlm.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
TEXT_COLUMNS = ("caption", "captions", "question")
COLUMNS = ("image", *TEXT_COLUMNS, "answer", "answers")
TABLES = (".csv", ".tsv", ".jsonl")
FORMS = "a .csv, .tsv or .jsonl file, or a folder of images with .txt files beside them"


@dataclass
class Described:
    """What the rows say about one image."""

    captions: list[str] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)


def read_table(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a CSV, TSV or JSONL file, each with a name for error messages ("row 3": the line of the table's third record).

    Raises:
        UserError: text that is not UTF-8, a row that cannot be read, columns that are missing or stand twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path} row {number}", _parse_row(path, number, line)
        return
    rows = _rows(path, text)
    columns = [c.strip() for c in next(rows, ())]
    _check_columns(path, columns)
    for number, cells in enumerate(rows, 2):
        if len(cells) > len(columns):
            raise UserError(
                f"{path} row {number}: {len(cells)} cells, expected {len(columns)}; put text with commas in quotes"
            )
        yield f"{path} row {number}", {name: cell for name, cell in zip(columns, cells, strict=False) if cell}


def _rows(path: Path, text: str) -> Iterator[list[str]]:
    """The cells of each row that is not empty; `strict`, as an unclosed quote would take all rows up to the next one into its cell."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    number = 1
    try:
        for cells in csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True):
            if cells:
                yield cells
                number += 1
    except csv.Error as error:
        raise UserError(
            f"{path} row {number}: not a readable table ({error}); a cell that begins with a quote ends with one, "
            'and a quote inside it is written twice (""); or write the table as .jsonl'
        ) from None


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if "image" not in columns:
        raise UserError(f"{path} row 1: the columns are {', '.join(columns) or 'missing'}; expected one named 'image'")
    if not set(columns) & set(TEXT_COLUMNS):
        raise UserError(
            f"{path} row 1: the columns are {', '.join(columns)}; expected one of {', '.join(TEXT_COLUMNS)} too"
        )
    if twice := [c for c in COLUMNS if columns.count(c) > 1]:
        raise UserError(
            f"{path} row 1: the column {twice[0]!r} stands {columns.count(twice[0])} times, expected once; "
            "write several texts as rows of their own, or as a JSON list in 'captions' or 'answers'"
        )


def _parse_row(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path} row {number}: not JSON ({error}); expected one object a line") from None
    if not isinstance(row, dict):
        raise UserError(
            f"{path} row {number}: got {line[:60]}, expected an object such as {{'image': 'a.jpg', 'caption': 'a dog'}}"
        )
    return row


def texts(row: Mapping[str, Any], where: str, one: str, several: str = "") -> list[str]:
    """What a row says in the column `one`, a text, and in `several`, a list of texts (in a CSV written as JSON)."""
    found: list[str] = []
    for column, as_list in ((one, False), (several, True)):
        value = row.get(column)
        if value is None:
            continue
        if as_list and isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise UserError(f"{where}, column {column!r}: not a JSON list ({error})") from None
        values = value if as_list and isinstance(value, list) else [value]
        for text in values:
            if isinstance(text, (int, float)) and not isinstance(text, bool):
                text = str(text)
            if not isinstance(text, str):
                raise UserError(
                    f"{where}, column {column!r}: got {text!r}, expected text"
                    + (" or a list of texts" if as_list else "")
                )
            if text.strip():
                found.append(text.strip())
    return found


def collect(source: Path) -> dict[str, Described]:
    """What is said about each image, by its path as written, from a table's rows in order."""
    images: dict[str, Described] = {}
    questions = 0
    for where, row in read_table(source):
        name = row.get("image")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}, column 'image': got {name!r}, expected the path of an image file")
        image = images.setdefault(os.path.normpath(name.strip()), Described())
        image.captions += texts(row, where, "caption", "captions")
        asked, answers = texts(row, where, "question"), texts(row, where, "answer", "answers")
        if asked and not answers:
            raise UserError(
                f"{where}, column 'answer': the question {asked[0]!r} has no answer; expected a column 'answer' or 'answers'"
            )
        if answers and not asked:
            raise UserError(f"{where}, column 'question': the answer {answers[0]!r} has no question")
        if asked:
            questions += 1
            image.questions.append(question(questions, asked[0], answers))
    return images


def collect_folder(source: Path, left_out: LeftOut) -> dict[str, Described]:
    """Captions by the image's path inside `source`, from the .txt file beside each image (one caption a line); other files are counted."""
    images: dict[str, Described] = {}
    for path in sorted(source.rglob("*")):
        suffix, beside = path.suffix.lower(), path.with_suffix(".txt")
        if suffix not in SUFFIXES:
            if suffix != ".txt" and path.is_file():
                why = "a table is a --source of its own" if suffix in TABLES else "not taken for an image"
                left_out.add(f"{suffix or 'nameless'} file, {why}", path.relative_to(source))
        elif beside.is_file():
            images[os.fspath(path.relative_to(source))] = Described(
                [line.strip() for line in read_lines(beside, "your own folder")]
            )
        else:
            left_out.add("image without a .txt file beside it", path.relative_to(source))
    return images


def prepare(args: argparse.Namespace) -> None:
    left_out = LeftOut()
    if args.source.is_dir():
        root, images = args.source, collect_folder(args.source, left_out)
    elif not args.source.exists():
        raise UserError(f"--source {args.source} is missing; expected {FORMS}")
    elif args.source.suffix.lower() not in TABLES:
        raise UserError(f"--source {args.source} is a {args.source.suffix or 'nameless'} file; expected {FORMS}")
    else:
        root, images = args.images or args.source.parent, collect(args.source)
    if not root.is_dir():
        raise UserError(
            f"--images {root} is not a folder; expected the folder that the paths in the column 'image' start from"
        )
    splits: dict[str, list[Photograph]] = {"train": [], "val": []}
    keys: set[str] = set()
    for name, said in images.items():
        key = shard_key(os.path.splitext(name)[0])
        if key in keys:  # a.jpg beside a.png, or a/b.jpg beside a_b.jpg
            key = f"{key}-{keyed_hash(name, 'key'):016x}"
        keys.add(key)
        split = "val" if keyed_hash(name, "folder holdout") < args.val_fraction * 2**64 else "train"
        splits[split].append(Photograph(key, root / name, name, tuple(said.captions), tuple(said.questions)))
    source = args.source_name or shard_key(args.source.resolve().stem)
    written = write_splits(args.out, source, splits, left_out, args.samples_per_shard, os.fspath(root))
    if not written["val"] and args.val_fraction:
        print("No image fell into val; raise --val-fraction to have something to evaluate on.", file=sys.stderr)


def fraction(text: str) -> float:
    """An argparse type: a number from 0 up to, not including, 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to below 1")
    return value


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="where relative image paths of a table start; else the table's own folder",
    )
    parser.add_argument(
        "--val-fraction",
        type=fraction,
        default=0.05,
        metavar="F",
        help="share of the images held out, by a hash of the path",
    )
    parser.add_argument(
        "--source-name", metavar="NAME", help="name of this data in the shards; else the source's file name"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write your own images and texts as shards.", arguments, prepare, argv, source=FORMS)


if __name__ == "__main__":
    sys.exit(main())
