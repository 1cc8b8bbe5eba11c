"""VizWiz-VQA: the official questions and photographs to shards. See README.md beside this file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm.data.official import files_here, given, name_server_form, of_kind
from vlm.data.prepare import LeftOut, Photograph, read_json, require, run, shard_key, write_splits
from vlm.data.references import question
from vlm.errors import UserError

PAGE = "https://vizwiz.org/tasks-and-datasets/vqa/"
QUESTIONS = f"Annotations.zip from {PAGE} (extract into Annotations/)"
IMAGES = f"train.zip, val.zip and test.zip from {PAGE} (extract into train/, val/ and test/)"


def photographs(path: Path, folder: Path) -> list[Photograph]:
    """The photographs of a split, each with its one question; those of the test set have no answers."""
    made = []
    try:
        for row in of_kind(read_json(path, QUESTIONS), "file", list):
            name, text = given(row, "image", str), given(row, "question", str).strip()
            answers = [given(answer, "answer", str) for answer in of_kind(row.get("answers", []), "answers", list)]
            asked = question(name, text, answers)
            if "answer_type" in row:
                asked["answer_type"] = given(row, "answer_type", str)
            made.append(Photograph(shard_key(Path(name).stem), folder / name, Path(name).stem, questions=(asked,)))
    except ValueError as error:
        raise UserError(f"{path} is not in VizWiz' form ({error}); expected: {QUESTIONS}") from None
    return made


def prepare(args: argparse.Namespace) -> None:
    files = files_here({s: args.source / "Annotations" / f"{s}.json" for s in ("train", "val", "test")}, QUESTIONS)
    splits = {split: photographs(path, require(args.source / split, IMAGES)) for split, path in files.items()}
    written = write_splits(args.out, "vizwiz", splits, LeftOut(), args.samples_per_shard, IMAGES)
    for split in (split for split, photographs in written.items() if photographs):
        name_server_form(args.out / split, {"question_id": "image"})


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write VizWiz-VQA as shards.", lambda _: None, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
