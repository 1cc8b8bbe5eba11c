"""GQA: the official balanced questions and photographs to shards, one record a photograph. See README.md beside this file."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.data.official import (
    add_leave_out,
    files_here,
    given,
    name_server_form,
    of_kind,
    read_coco_splits,
    read_left_out,
)
from vlm.data.prepare import LeftOut, Photograph, read_json, require, run, shard_key, write_splits
from vlm.data.references import question
from vlm.errors import UserError

PAGE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
QUESTIONS = f"questions1.2.zip from {PAGE} (extract into questions/)"
IMAGES = f"images.zip from {PAGE} (folder images/)"
VISUAL_GENOME = "image_data.json.zip of Visual Genome, https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
PARTS = {"train": "train", "val": "val", "test": "testdev"}


def read_questions(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Questions by image id; the structural type ("query", "verify", ...) is the question's."""
    questions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    try:
        for question_id, row in of_kind(read_json(path, QUESTIONS), "file", dict).items():
            asked = question(question_id, given(row, "question", str), [given(row, "answer", str)])
            kind = given(given(row, "types", dict), "structural", str)
            questions[str(given(row, "imageId", str, int))].append(asked | {"question_type": kind})
    except ValueError as error:
        raise UserError(f"{path} is not in GQA's form ({error}); expected: {QUESTIONS}") from None
    return questions


def identity(image: str) -> int | str:
    """Visual Genome's number where the photograph is from there; testdev's own ("n161313") stay as they are."""
    return int(image) if image.isdecimal() else image


def held_out_of_coco(source: Path, karpathy: Path) -> set[int | str]:
    """Visual Genome's numbers of the photographs that Karpathy's split of COCO keeps for val and test."""
    path = source / "image_data.json"
    coco_ids = read_coco_splits(karpathy)
    try:
        return {
            given(image, "image_id", int)
            for image in of_kind(read_json(path, VISUAL_GENOME), "file", list)
            if given(image, "coco_id", int, type(None)) in coco_ids
        }
    except ValueError as error:
        raise UserError(f"{path} is not in Visual Genome's form ({error}); expected: {VISUAL_GENOME}") from None


def prepare(args: argparse.Namespace) -> None:
    files = {s: args.source / "questions" / f"{part}_balanced_questions.json" for s, part in PARTS.items()}
    files = files_here(files, QUESTIONS)
    folder = require(args.source / "images", IMAGES)
    kept_out = read_left_out(args.leave_out)
    if args.karpathy:
        kept_out |= held_out_of_coco(args.source, args.karpathy)
    left_out = LeftOut()
    splits: dict[str, list[Photograph]] = {}
    for split, path in files.items():
        splits[split] = []
        for image, questions in read_questions(path).items():
            if split == "train" and identity(image) in kept_out:
                left_out.add("training photograph that --leave-out or --karpathy keeps out", image)
                continue
            photograph = Photograph(
                shard_key(image), folder / f"{image}.jpg", identity(image), questions=tuple(questions)
            )
            splits[split].append(photograph)
    written = write_splits(args.out, "visual_genome", splits, left_out, args.samples_per_shard, IMAGES)
    for split in (split for split, photographs in written.items() if photographs):
        name_server_form(args.out / split, {"question_id": "questionId", "answer": "prediction"})


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--karpathy",
        type=Path,
        metavar="JSON",
        help="dataset_coco.json: COCO's val and test photographs are not trained on (needs Visual Genome's image_data.json in the source)",
    )
    add_leave_out(parser, "val_references.json of visual_genome")


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write GQA as shards.", arguments, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
