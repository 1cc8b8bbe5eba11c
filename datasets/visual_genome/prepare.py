"""Visual Genome: the official download to shards, region descriptions as captions, with questions where given. See README.md beside this file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.data.official import given, of_kind, read_coco_splits
from vlm.data.prepare import LeftOut, Photograph, keyed_hash, read_json, require, run, whole_number, write_splits
from vlm.data.references import question
from vlm.errors import UserError

IMAGES = "images.zip and images2.zip (folders VG_100K/ and VG_100K_2/)"
DATA = "image_data.json.zip"
REGIONS = "region_descriptions.json.zip"
QUESTIONS = "question_answers.json.zip"


def read_questions(path: Path) -> dict[int, tuple[dict[str, Any], ...]]:
    """Questions by image, each with its one answer."""
    try:
        return {
            given(entry, "id", int): tuple(
                question(
                    given(qa, "qa_id", int),
                    given(qa, "question", str).strip(),
                    [given(qa, "answer", str).strip().removesuffix(".").lower()],
                )
                for qa in given(entry, "qas", list)
            )
            for entry in of_kind(read_json(path, QUESTIONS), "file", list)
        }
    except ValueError as error:
        raise UserError(f"{path}: {error}; expected the list of {QUESTIONS}, version 1.2") from None


def prepare(args: argparse.Namespace) -> None:
    folders = [require(args.source / "VG_100K", IMAGES), args.source / "VG_100K_2"]
    files = {path.stem: path for folder in folders if folder.is_dir() for path in folder.glob("*.jpg")}
    images = read_json(args.source / "image_data.json", DATA)
    regions = read_json(args.source / "region_descriptions.json", REGIONS)
    asked = args.source / "question_answers.json"
    questions = read_questions(asked) if asked.exists() else {}
    kept_out = read_coco_splits(args.karpathy) if args.karpathy else {}
    if not kept_out:
        print(
            "Half of these images are COCO's: give --karpathy dataset_coco.json to leave out its val and test images.",
            file=sys.stderr,
        )
    left_out = LeftOut()
    splits: dict[str, list[Photograph]] = {"train": [], "val": []}
    try:
        phrases = {
            given(entry, "id", int): [
                str(given(region, "phrase", str, int)).strip() for region in given(entry, "regions", list)
            ]
            for entry in of_kind(regions, "file", list)
        }
        for image in of_kind(images, "file", list):
            number = given(image, "image_id", int)
            if of_kind(image.get("coco_id"), "coco_id", int, type(None)) in kept_out:
                left_out.add("image of COCO's val or test split", number)
                continue
            captions = tuple(dict.fromkeys(phrase for phrase in phrases.get(number, ()) if phrase))
            split = "val" if keyed_hash(str(number), "visual_genome") % args.holdout_every == 0 else "train"
            path = files.get(str(number), folders[0] / f"{number}.jpg")
            splits[split].append(Photograph(str(number), path, number, captions, questions.get(number, ())))
    except ValueError as error:
        raise UserError(f"{args.source}: {error}; expected the lists of {DATA} and {REGIONS}, version 1.2") from None
    write_splits(args.out, "visual_genome", splits, left_out, args.samples_per_shard, IMAGES)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--karpathy", type=Path, metavar="JSON", help="dataset_coco.json: its val and test images are left out"
    )
    parser.add_argument(
        "--holdout-every", type=whole_number(2), default=50, metavar="N", help="every N-th image goes to val"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write Visual Genome as shards.", arguments, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
