"""VizWiz-Captions: the official captions and photographs to shards. See README.md beside this file."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.data.official import files_here, given, name_server_form, read_coco_captions
from vlm.data.prepare import LeftOut, Photograph, require, run, shard_key, write_splits
from vlm.data.references import caption_references
from vlm.files import write_json

PAGE = "https://vizwiz.org/tasks-and-datasets/image-captioning/"
CAPTIONS = f"annotations.zip from {PAGE} (extract into annotations/)"
IMAGES = f"train.zip and val.zip from {PAGE} (extract into train/ and val/)"


def prepare(args: argparse.Namespace) -> None:
    left_out = LeftOut()

    def unusable(annotation: Mapping[str, Any]) -> bool:
        """Whether the official evaluation passes it over: the sentence offered for pictures that show nothing, and spam."""
        marks = [mark for mark in ("is_precanned", "is_rejected") if given(annotation, mark, bool, int)]
        if marks:
            left_out.add(f"caption marked {marks[0]}", annotation["caption"])
        return bool(marks)

    files = files_here({s: args.source / "annotations" / f"{s}.json" for s in ("train", "val")}, CAPTIONS)
    splits = {}
    numbers: dict[str, int] = {}
    for split, path in files.items():
        folder = require(args.source / split, IMAGES)
        listed = read_coco_captions(path, CAPTIONS, unusable)
        numbers |= {Path(name).stem: image["id"] for name, image, _ in listed}
        splits[split] = [
            Photograph(shard_key(Path(name).stem), folder / name, Path(name).stem, captions)
            for name, _, captions in listed
        ]
    written = write_splits(args.out, "vizwiz", splits, left_out, args.samples_per_shard, IMAGES)
    if written["val"]:
        name_server_ids(args.out, written["val"], numbers)


def name_server_ids(out: Path, photographs: Sequence[Photograph], numbers: Mapping[str, int]) -> None:
    """Give val's references and predictions the server's numbers. The records keep the names, which the question set knows these photographs by."""
    name_server_form(out / "val", {}, {p.path.stem: numbers[p.path.stem] for p in photographs})
    references = caption_references([replace(p, image_id=numbers[p.path.stem]) for p in photographs])
    for image, photograph in zip(references["images"], photographs, strict=True):
        image["file_name"] = photograph.path.name
    write_json(out / "val_references.json", references)


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write VizWiz-Captions as shards.", lambda _: None, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
