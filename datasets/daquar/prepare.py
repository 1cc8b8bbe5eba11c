"""DAQUAR: the official question files and NYU Depth photographs to shards, one record a photograph. See README.md beside this file."""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.data.prepare import (
    LeftOut,
    Photograph,
    keyed_hash,
    read_lines,
    require,
    run,
    whole_number,
    write_splits,
)
from vlm.data.references import question
from vlm.errors import UserError

PAGE = "https://www.mpi-inf.mpg.de/departments/computer-vision-and-machine-learning/research/vision-and-language/visual-turing-challenge"
IMAGES = f"nyu_depth_images.tar from {PAGE}"
TEXT = f"the full DAQUAR question files (894 classes, raw) and image lists from {PAGE}"

# "... in the image3 ?", and the two other ways in which the annotators wrote it
WHERE = re.compile(r"\s*(?:\b(?:in|on|of)\s+(?:the\s+|this\s+)?)?\b(image\d+)\s*\?\s*$")


def read_pairs(path: Path, left_out: LeftOut) -> dict[str, list[dict[str, Any]]]:
    """Questions by image name, from a file that alternates question and answer lines."""
    lines = read_lines(path, TEXT)
    if len(lines) % 2:
        raise UserError(
            f"{path} has {len(lines)} lines; expected a question and an answer in turn. Download it again: {TEXT}"
        )
    questions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(0, len(lines), 2):
        match = WHERE.search(lines[number])
        if match is None:
            left_out.add("question that names no image", lines[number].strip())
            continue
        name = match[1]
        text = lines[number][: match.start()].strip() + "?"
        identity = int(name.removeprefix("image")) * 1000 + len(questions[name])
        questions[name].append(question(identity, text, [lines[number + 1].strip()]))
    return questions


def photographs(args: argparse.Namespace, part: str, left_out: LeftOut) -> list[Photograph]:
    """The photographs of the official train or test list, with their questions."""
    folder = require(args.source / "nyu_depth_images", IMAGES)
    listed = [name.strip() for name in read_lines(args.source / f"{part}_images_list.txt", TEXT)]
    questions = read_pairs(args.source / f"qa.894.raw.{part}.txt", left_out)
    for name in sorted(questions.keys() - set(listed)):
        left_out.add(f"questions about a photograph that is not in {part}_images_list.txt", name, len(questions[name]))
    found = {path.stem: path for path in sorted(folder.iterdir(), reverse=True)}
    return [
        Photograph(name, found.get(name, folder / f"{name}.png"), name, questions=tuple(questions.get(name, ())))
        for name in listed
    ]


def prepare(args: argparse.Namespace) -> None:
    left_out = LeftOut()
    test_here = (args.source / "qa.894.raw.test.txt").exists()
    every = args.holdout_every if args.holdout_every is not None else 0 if test_here else 5
    splits: dict[str, list[Photograph]] = {"train": [], "val": [], "test": []}
    for photograph in photographs(args, "train", left_out):
        held_out = every and keyed_hash(photograph.key, "daquar holdout") % every == 0
        splits["val" if held_out else "train"].append(photograph)
    if test_here:
        splits["test"] = photographs(args, "test", left_out)
    else:
        print(f"No qa.894.raw.test.txt in {args.source}: no test split is written.", file=sys.stderr)
    if every:
        print(
            f"About every {every}th photograph of the training list goes to val, chosen by a hash of its name.",
            file=sys.stderr,
        )
    write_splits(args.out, "daquar", splits, left_out, args.samples_per_shard, IMAGES)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--holdout-every",
        type=whole_number(0),
        metavar="N",
        help="move about one in N training photographs to val; 0 moves none; without the official test files 5, else 0",
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write DAQUAR as shards.", arguments, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
