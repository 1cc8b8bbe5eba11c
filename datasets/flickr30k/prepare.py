"""Flickr30k in Karpathy's splits: the official photographs and dataset_flickr30k.json to shards. See README.md beside this file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm.data.official import CAPTION_DATASETS, add_leave_out, read_karpathy, read_left_out
from vlm.data.prepare import LeftOut, Photograph, require, run, shard_key, write_splits
from vlm.errors import UserError

IMAGES = "flickr30k-images.tar, by the request form of https://shannon.cs.illinois.edu/DenotationGraph/"
LISTS = "dataset_flickr30k.json"


def flickr_number(name: object) -> str:
    """The number that Flickr gave a photograph, which begins its name in Flickr8k ("1000268201_693b08cb0e") and is it in Flickr30k."""
    return str(name).partition("_")[0]


def prepare(args: argparse.Namespace) -> None:
    folder = require(args.source / "flickr30k-images", IMAGES)
    kept_out = {flickr_number(name) for name in read_left_out(args.leave_out)}
    left_out = LeftOut()
    splits: dict[str, list[Photograph]] = {"train": [], "val": [], "test": []}
    path = args.source / LISTS
    for entry in read_karpathy(path, coco=False):
        stem = Path(entry.name).stem
        if entry.split not in splits:
            raise UserError(
                f"{path}: {entry.name} is of split {entry.split!r}, expected train, val or test as in {CAPTION_DATASETS}"
            )
        if entry.split == "train" and flickr_number(stem) in kept_out:
            left_out.add("training photograph that --leave-out names", entry.name)
        else:
            splits[entry.split].append(Photograph(shard_key(stem), folder / entry.name, stem, entry.captions))
    write_splits(args.out, "flickr30k", splits, left_out, args.samples_per_shard, IMAGES)


def arguments(parser: argparse.ArgumentParser) -> None:
    add_leave_out(parser, "val_references.json and test_references.json of flickr8k")


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write Flickr30k as shards.", arguments, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
