"""POPE: the official yes/no questions about objects in COCO's val2014 to shards of a test split. See README.md beside this file."""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.data.official import files_here, given
from vlm.data.prepare import LeftOut, Photograph, read_lines, require, run, shard_key, write_splits
from vlm.data.references import question
from vlm.errors import UserError

QUESTIONS = "https://github.com/AoiDragon/POPE, folder output/coco (coco_pope_random.json and its like)"
IMAGES = "val2014.zip from https://cocodataset.org/#download"
SUBSETS = ("random", "popular", "adversarial")
NAME = re.compile(r"COCO_val2014_(\d{12})\.jpg")


def read_questions(path: Path, subset: str) -> dict[str, list[dict[str, Any]]]:
    """Questions by file name, from a file of JSON lines; each subset counts its questions from 1, hence "random-1"."""
    questions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, line in enumerate(read_lines(path, QUESTIONS), 1):
        try:
            row = json.loads(line)
            name, label = given(row, "image", str), given(row, "label", str)
            asked = question(f"{subset}-{given(row, 'question_id', int, str)}", given(row, "text", str), [label])
            if not NAME.fullmatch(name) or label not in ("yes", "no"):
                raise ValueError(f"image {name!r}, label {label!r}")
        except ValueError as error:
            raise UserError(
                f"{path} line {number} is not in POPE's form ({error}); expected the file from: {QUESTIONS}"
            ) from None
        questions[name].append(asked | {"question_type": subset})
    return questions


def prepare(args: argparse.Namespace) -> None:
    files = files_here({s: args.source / f"coco_pope_{s}.json" for s in SUBSETS}, QUESTIONS)
    folder = require(args.source / "val2014", IMAGES)
    questions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for subset, path in files.items():
        found = read_questions(path, subset)
        if not found:
            sys.stderr.write(f"{path} holds no question: its {subset} part is not written.\n")
        for name, asked in found.items():
            questions[name] += asked
    photographs = [
        Photograph(shard_key(Path(name).stem), folder / name, int(name[-16:-4]), questions=tuple(asked))
        for name, asked in questions.items()
    ]
    write_splits(args.out, "coco", {"test": photographs}, LeftOut(), args.samples_per_shard, IMAGES)


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write POPE as shards.", lambda _: None, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
