"""NoCaps: the validation captions and Open Images photographs to shards of a val split. See README.md beside this file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm.data.official import read_coco_captions
from vlm.data.prepare import LeftOut, Photograph, require, run, shard_key, write_splits
from vlm.errors import UserError

CAPTIONS = "nocaps_val_4500_captions.json from https://nocaps.org/download"
IMAGES = "the validation photographs of Open Images (each entry of the captions file has its coco_url)"
DOMAINS = ("in", "near", "out")


def prepare(args: argparse.Namespace) -> None:
    path = args.source / "nocaps_val_4500_captions.json"
    images = read_coco_captions(path, CAPTIONS)
    folder = require(args.source / "validation", IMAGES)
    left_out = LeftOut()
    photographs = []
    for name, image, captions in images:
        domain = str(image.get("domain")).removesuffix("-domain")
        if domain not in DOMAINS:
            raise UserError(
                f"{path}: {name} is of domain {image.get('domain')!r}, expected in-, near- or out-domain as in {CAPTIONS}"
            )
        if args.domain in ("all", domain):
            photographs.append(Photograph(shard_key(Path(name).stem), folder / name, image["id"], captions))
        else:
            left_out.add("photograph of another domain", name)
    write_splits(args.out, "nocaps", {"val": photographs}, left_out, args.samples_per_shard, IMAGES)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--domain",
        choices=("all", *DOMAINS),
        default="all",
        help="write the photographs of one domain, to score it alone",
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write NoCaps as shards.", arguments, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
