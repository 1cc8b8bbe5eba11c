"""Flickr8k: the official download to shards. See README.md beside this file."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vlm.data.prepare import LeftOut, Photograph, read_lines, require, run, shard_key, write_splits
from vlm.errors import UserError

IMAGES = "Flickr8k_Dataset.zip (folder Flicker8k_Dataset/, so spelt officially)"
TEXT = "Flickr8k_text.zip (extract into the folder Flickr8k_text/)"
LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}


def read_captions(path: Path) -> dict[str, list[str]]:
    """Captions by file name, from lines `NAME.jpg#0<tab>caption`."""
    captions: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(read_lines(path, TEXT), 1):
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            raise UserError(f"{path} line {number}: got {line[:60]!r}, expected NAME.jpg#0, a tab and a caption")
        if caption.strip():
            captions[name.rpartition("#")[0]].append(caption.strip())
    return captions


def prepare(args: argparse.Namespace) -> None:
    folder = require(args.source / "Flicker8k_Dataset", IMAGES)
    text = require(args.source / "Flickr8k_text", TEXT)
    captions = read_captions(text / "Flickr8k.token.txt")
    present = {path.name for path in folder.iterdir() if path.is_file()}
    left_out = LeftOut()

    names = {split: read_lines(text / LISTS[split], TEXT) for split in ("train", "val")}
    if (text / LISTS["test"]).exists():
        names["test"] = read_lines(text / LISTS["test"], TEXT)
    else:
        print(f"No {LISTS['test']} in {text}: no test split is written; report on val.", file=sys.stderr)
    listed = {name.strip() for split in names.values() for name in split}
    for name in sorted(present - listed):
        if args.unlisted == "train":
            names["train"].append(name)
        else:
            left_out.add("photograph in no list (--unlisted train adds it)", name)
    for name in sorted(captions.keys() - present - listed):
        left_out.add("captions of a photograph that is not in the folder", name, len(captions[name]))
    splits = {
        split: [
            Photograph(
                shard_key(Path(name.strip()).stem),
                folder / name.strip(),
                Path(name.strip()).stem,
                tuple(captions.get(name.strip(), ())),
            )
            for name in lines
        ]
        for split, lines in names.items()
    }
    write_splits(args.out, "flickr8k", splits, left_out, args.samples_per_shard, IMAGES)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--unlisted",
        choices=("leave", "train"),
        default="leave",
        help="what to do with photographs that are in no list",
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write Flickr8k as shards.", arguments, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
