"""TextCaps: the official captions and Open Images photographs to shards. See README.md beside this file."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vlm.data.official import files_here, given
from vlm.data.prepare import LeftOut, Photograph, read_json, require, run, shard_key, write_splits
from vlm.errors import UserError

PAGE = "https://textvqa.org/textcaps/dataset"
CAPTIONS = f"TextCaps_0.1_train.json and TextCaps_0.1_val.json from {PAGE}"
IMAGES = f"train_val_images.zip from {PAGE}, which holds train_images/"


def read_captions(path: Path) -> dict[str, list[str]]:
    """Captions by Open Images id; the file has a row for each caption."""
    captions: dict[str, list[str]] = defaultdict(list)
    try:
        for row in given(read_json(path, CAPTIONS, ["data"]), "data", list):
            captions[str(given(row, "image_id", str, int))].append(given(row, "caption_str", str).strip())
    except ValueError as error:
        raise UserError(f"{path} is not in TextCaps' form ({error}); expected: {CAPTIONS}") from None
    return captions


def prepare(args: argparse.Namespace) -> None:
    files = files_here({s: args.source / f"TextCaps_0.1_{s}.json" for s in ("train", "val")}, CAPTIONS)
    folder = require(args.source / "train_images", IMAGES)
    splits = {
        split: [
            Photograph(
                shard_key(image), folder / f"{image}.jpg", image, tuple(caption for caption in captions if caption)
            )
            for image, captions in read_captions(path).items()
        ]
        for split, path in files.items()
    }
    write_splits(args.out, "open_images", splits, LeftOut(), args.samples_per_shard, IMAGES)


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write TextCaps as shards.", lambda _: None, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
