"""COCO captions in Karpathy's splits: the official photographs and dataset_coco.json to shards. See README.md beside this file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm.data.official import add_leave_out, read_karpathy, read_left_out
from vlm.data.prepare import LeftOut, Photograph, run, shard_key, write_splits
from vlm.errors import UserError

IMAGES = "train2014.zip and val2014.zip from https://cocodataset.org/#download"


def prepare(args: argparse.Namespace) -> None:
    entries = read_karpathy(args.source / "dataset_coco.json", coco=True)
    here = {name for name in ("train2014", "val2014") if (args.source / name).is_dir()}
    if not here:
        raise UserError(f"{args.source} has neither train2014/ nor val2014/. They come from: {IMAGES}")
    held_out = read_left_out(args.leave_out)
    names = {"train": "train", "val": "val", "test": "test"} | ({"restval": "train"} if args.restval == "train" else {})

    left_out = LeftOut()
    splits: dict[str, list[Photograph]] = {"train": [], "val": [], "test": []}
    for entry in entries:
        split = names.get(entry.split)
        if split is None:
            left_out.add(f"photograph of the split {entry.split!r}", entry.name)
        elif entry.folder not in here:
            left_out.add(f"photograph of {entry.folder}/, a folder that is not here", entry.name)
        elif split == "train" and entry.coco_id in held_out:
            left_out.add("training photograph that --leave-out names", entry.name)
        else:
            path = args.source / entry.folder / entry.name
            splits[split].append(Photograph(shard_key(Path(entry.name).stem), path, entry.coco_id, entry.captions))
    write_splits(args.out, "coco", splits, left_out, args.samples_per_shard, IMAGES)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restval",
        choices=("train", "leave"),
        default="train",
        help="what to do with the part of val2014 that is in neither val nor test",
    )
    add_leave_out(parser, "val_questions.json of vqa_v2")


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write COCO captions as shards.", arguments, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
