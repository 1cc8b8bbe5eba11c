"""TextVQA: the official questions and Open Images photographs to shards, one record a photograph. See README.md beside this file."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.data.official import files_here, given, of_kind
from vlm.data.prepare import LeftOut, Photograph, read_json, require, run, shard_key, write_splits
from vlm.data.references import question
from vlm.errors import UserError

PAGE = "https://textvqa.org/dataset"
QUESTIONS = f"TextVQA_0.5.1_train.json, TextVQA_0.5.1_val.json and TextVQA_0.5.1_test.json from {PAGE}"
IMAGES = f"train_val_images.zip (train_images/) and test_images.zip (test_images/) from {PAGE}"
FOLDERS = {"train": "train_images", "val": "train_images", "test": "test_images"}


def read_questions(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Questions by Open Images id; those of the test set have no answers."""
    questions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    try:
        for row in given(read_json(path, QUESTIONS, ["data"]), "data", list):
            name, text = given(row, "question_id", int, str), given(row, "question", str).strip()
            answers = [of_kind(answer, "answer", str) for answer in of_kind(row.get("answers", []), "answers", list)]
            questions[str(given(row, "image_id", str, int))].append(question(name, text, answers))
    except ValueError as error:
        raise UserError(f"{path} is not in TextVQA's form ({error}); expected: {QUESTIONS}") from None
    return questions


def prepare(args: argparse.Namespace) -> None:
    files = files_here({s: args.source / f"TextVQA_0.5.1_{s}.json" for s in FOLDERS}, QUESTIONS)
    splits = {}
    for split, path in files.items():
        folder = require(args.source / FOLDERS[split], IMAGES)
        splits[split] = [
            Photograph(shard_key(image), folder / f"{image}.jpg", image, questions=tuple(questions))
            for image, questions in read_questions(path).items()
        ]
    write_splits(args.out, "open_images", splits, LeftOut(), args.samples_per_shard, IMAGES)


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write TextVQA as shards.", lambda _: None, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
