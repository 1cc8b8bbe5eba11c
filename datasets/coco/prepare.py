"""COCO captions in Karpathy's splits: the official photographs and dataset_coco.json to shards. See README.md beside this file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm.data.prepare import LeftOut, Photograph, read_json, run, shard_key, write_splits
from vlm.data.references import read_image_ids
from vlm.errors import UserError

SPLITS_FILE = "caption_datasets.zip of Karpathy and Fei-Fei (file dataset_coco.json)"
IMAGES = "train2014.zip and val2014.zip from https://cocodataset.org/#download"


def prepare(args: argparse.Namespace) -> None:
    path = args.source / "dataset_coco.json"
    entries = read_json(path, SPLITS_FILE, ["images"])["images"]
    here = {name for name in ("train2014", "val2014") if (args.source / name).is_dir()}
    if not here:
        raise UserError(f"{args.source} has neither train2014/ nor val2014/. They come from: {IMAGES}")
    held_out = read_image_ids(args.leave_out) if args.leave_out else set()
    names = {"train": "train", "val": "val", "test": "test"} | ({"restval": "train"} if args.restval == "train" else {})

    left_out = LeftOut()
    splits: dict[str, list[Photograph]] = {"train": [], "val": [], "test": []}
    for number, entry in enumerate(entries):
        try:
            name, image_id, split = entry["filename"], entry["cocoid"], entry["split"]
            captions = tuple(text for sentence in entry["sentences"] if (text := sentence["raw"].strip()))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: entry {number} is not in Karpathy's form (missing {error}); expected the file from: {SPLITS_FILE}"
            ) from None
        if split not in names:
            left_out.add(f"photograph of the split {split!r}", name)
        elif entry["filepath"] not in here:
            left_out.add(f"photograph of {entry['filepath']}/, a folder that is not here", name)
        elif names[split] == "train" and image_id in held_out:
            left_out.add("training photograph that --leave-out names", name)
        else:
            splits[names[split]].append(
                Photograph(shard_key(Path(name).stem), args.source / entry["filepath"] / name, image_id, captions)
            )
    write_splits(args.out, "coco", splits, left_out, args.samples_per_shard, IMAGES)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restval",
        choices=("train", "leave"),
        default="train",
        help="what to do with the part of val2014 that is in neither val nor test",
    )
    parser.add_argument(
        "--leave-out",
        type=Path,
        metavar="JSON",
        help="an official-form file (as val_questions.json of vqa_v2) whose photographs must not be trained on",
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write COCO captions as shards.", arguments, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
