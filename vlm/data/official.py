"""Official files whose form several recipes share: Karpathy's splits, COCO's captions, a file for each split, what must not be trained on, and in
which form a data set's server takes predictions. `given` and `of_kind` check what their readers find.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.index import SERVER
from vlm.data.prepare import read_json
from vlm.data.references import read_image_ids
from vlm.errors import UserError
from vlm.files import write_json

CAPTION_DATASETS = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
KINDS = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
KARPATHY = "caption_datasets.zip of Karpathy and Fei-Fei (file {name})"


def of_kind(value: Any, name: str, *kinds: type) -> Any:
    """The value of that name in a file, if it is of one of these kinds of JSON. Raises ValueError that says what it is and what was expected."""
    if type(value) not in kinds:
        expected = " or ".join(KINDS[kind] for kind in kinds)
        raise ValueError(f"{name!r} is {json.dumps(value):.60}, expected {expected}")
    return value


def given(row: Any, name: str, *kinds: type) -> Any:
    """The field of that name of an object in a file, if it is of one of these kinds. Raises ValueError as `of_kind`, and where it is missing."""
    if name not in of_kind(row, "entry", dict):
        raise ValueError(f"missing {name!r}")
    return of_kind(row[name], name, *kinds)


@dataclass(frozen=True)
class Listed:
    """A photograph in Karpathy's file. folder: of COCO's alone, train2014 or val2014; coco_id likewise."""

    name: str
    split: str
    captions: tuple[str, ...]
    folder: str = ""
    coco_id: int = 0


def read_karpathy(path: Path, coco: bool) -> list[Listed]:
    """The photographs of dataset_coco.json, or of another of Karpathy's files."""
    download = KARPATHY.format(name="dataset_coco.json" if coco else path.name)
    content = read_json(path, download, ["images"])
    listed: list[Listed] = []
    try:
        for entry in given(content, "images", list):
            raw = (given(sentence, "raw", str).strip() for sentence in given(entry, "sentences", list))
            captions = tuple(text for text in raw if text)
            of_coco = (given(entry, "filepath", str), given(entry, "cocoid", int)) if coco else ()
            listed.append(Listed(given(entry, "filename", str), given(entry, "split", str), captions, *of_coco))
    except ValueError as error:
        raise UserError(
            f"{path}: entry {len(listed)} is not in Karpathy's form ({error}); expected the file from: {download}"
        ) from None
    return listed


def read_coco_splits(path: Path) -> dict[int, str]:
    """The COCO ids that dataset_coco.json keeps for val and test, with that split; its captions need not be there."""
    download = KARPATHY.format(name="dataset_coco.json")
    content = read_json(path, download, ["images"])
    try:
        splits = {given(e, "cocoid", int): given(e, "split", str) for e in given(content, "images", list)}
    except ValueError as error:
        raise UserError(f"{path} is not in Karpathy's form ({error}); expected the file from: {download}") from None
    return {image_id: split for image_id, split in splits.items() if split in ("val", "test")}


def read_coco_captions(
    path: Path, download: str, unusable: Callable[[Mapping[str, Any]], bool] = lambda _: False
) -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Name, entry and captions of each image of a file in COCO's caption form; `unusable` says which annotations to pass over."""
    content = read_json(path, download, ["images", "annotations"])
    captions: dict[int, list[str]] = defaultdict(list)
    try:
        for annotation in given(content, "annotations", list):
            text = given(annotation, "caption", str).strip()
            if text and not unusable(annotation):
                captions[given(annotation, "image_id", int)].append(text)
        return [
            (given(image, "file_name", str), image, tuple(captions.get(given(image, "id", int), ())))
            for image in given(content, "images", list)
        ]
    except ValueError as error:
        raise UserError(f"{path} is not in COCO's caption form ({error}); expected the file from: {download}") from None


def files_here(files: Mapping[str, Path], download: str) -> dict[str, Path]:
    """The files that are there, by split; stderr names the others, an error where there is none."""
    here = {split: path for split, path in files.items() if path.exists()}
    if not here:
        names = ", ".join(str(path) for path in files.values())
        raise UserError(f"none of these files is there: {names}. They come from: {download}")
    for split, path in files.items():
        if split not in here:
            sys.stderr.write(f"No {path}: its {split} part is not written.\n")
    return here


def add_leave_out(parser: argparse.ArgumentParser, example: str) -> None:
    """The option --leave-out, whose files `read_left_out` reads."""
    parser.add_argument(
        "--leave-out",
        type=Path,
        nargs="+",
        default=[],
        metavar="JSON",
        help=f"official-form files (as {example}) whose photographs must not be trained on",
    )


def read_left_out(paths: Iterable[Path]) -> set[int | str]:
    """The ids of all photographs that the files of --leave-out name."""
    return {image_id for path in paths for image_id in read_image_ids(path)}


def name_server_form(folder: Path, names: Mapping[str, str], image_ids: Mapping[str, int] | None = None) -> None:
    """Say in the index of these shards in which form the data set's server takes predictions, for `in_server_form`.

    names: what it calls VQA's "question_id" and "answer". image_ids: by the records' image id the number that it knows the image by.
    """
    path = folder / "index.json"
    form = {"names": dict(names), "image_ids": dict(image_ids or {})}
    write_json(path, json.loads(path.read_bytes()) | {SERVER: form})


def in_server_form(predictions: Iterable[dict[str, Any]], root: str) -> list[dict[str, Any]]:
    """Predictions in VQA's or COCO's form, in the form that the index of their shards names.

    They stay as they are where it names none, as of shards that were written before, filtered, joined, or are at an address.
    """
    try:
        form = json.loads((Path(root) / "index.json").read_bytes())[SERVER]
        names, numbers = form["names"], form["image_ids"]
    except (OSError, ValueError, KeyError, TypeError):
        return list(predictions)
    return [
        {names.get(k, k): numbers.get(v, v) if k == "image_id" else v for k, v in prediction.items()}
        for prediction in predictions
    ]
