"""easy-VQA: the PyPI package's drawn shapes and questions to shards, one record an image. See README.md beside this file."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.data.official import of_kind
from vlm.data.prepare import (
    LeftOut,
    Photograph,
    keyed_hash,
    read_json,
    require,
    run,
    whole_number,
    write_splits,
)
from vlm.data.references import question
from vlm.errors import UserError

DOWNLOAD = "pip download --no-deps easy-vqa, then unzip the .whl (it holds easy_vqa/data/train and easy_vqa/data/test)"
QUESTION_IDS = {"train": 0, "test": 1_000_000}


def images(folder: Path, part: str) -> list[Photograph]:
    """The images of the official train or test part, with their questions."""
    path = folder / part / "questions.json"
    questions: dict[int, list[dict[str, Any]]] = defaultdict(list)
    try:
        rows = of_kind(read_json(path, DOWNLOAD), "file", list)
    except ValueError as error:
        raise UserError(f"{path}: {error} of questions. Get it by: {DOWNLOAD}") from None
    for number, row in enumerate(rows):
        if not isinstance(row, list) or [type(value) for value in row] != [str, str, int]:
            raise UserError(
                f"{path}: entry {number} is {row!r}, expected [question, answer, image number]. Get it by: {DOWNLOAD}"
            )
        text, answer, image = row
        questions[image].append(question(QUESTION_IDS[part] + number, text, [answer]))
    pictures = require(folder / part / "images", DOWNLOAD)
    return [
        Photograph(f"{part}-{image}", pictures / f"{image}.png", f"{part}-{image}", questions=tuple(asked))
        for image, asked in questions.items()
    ]


def prepare(args: argparse.Namespace) -> None:
    require(args.source, DOWNLOAD)
    folder = next((f for f in (args.source / "easy_vqa" / "data", args.source / "data") if f.is_dir()), args.source)
    splits: dict[str, list[Photograph]] = {"train": [], "val": [], "test": images(folder, "test")}
    for image in images(folder, "train"):
        held_out = args.holdout_every and keyed_hash(image.key, "easy_vqa holdout") % args.holdout_every == 0
        splits["val" if held_out else "train"].append(image)
    write_splits(args.out, "easy_vqa", splits, LeftOut(), args.samples_per_shard, DOWNLOAD)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--holdout-every",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="move about one in N training images to val; 0 moves none",
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write easy-VQA as shards.", arguments, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
