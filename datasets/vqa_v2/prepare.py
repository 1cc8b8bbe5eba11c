"""VQA v2: the official questions, annotations and COCO photographs to shards, one record a photograph. See README.md beside this file."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm.data.prepare import LeftOut, Photograph, read_json, run, shard_key, whole_number, write_splits
from vlm.data.references import read_image_ids
from vlm.errors import ConfigError, UserError

QUESTIONS = "v2_Questions_{part}_mscoco.zip from https://visualqa.org/download.html"
ANNOTATIONS = "v2_Annotations_{part}_mscoco.zip from https://visualqa.org/download.html"
IMAGES = "train2014.zip and val2014.zip from https://cocodataset.org/#download"
SPLITS_FILE = "caption_datasets.zip of Karpathy and Fei-Fei (file dataset_coco.json)"


def read_questions(source: Path, subset: str, left_out: LeftOut) -> dict[int, list[dict[str, Any]]]:
    """The questions of train2014 or val2014 with their answers, by COCO image id."""
    part = subset.removesuffix("2014").capitalize()
    question_path = source / f"v2_OpenEnded_mscoco_{subset}_questions.json"
    answer_path = source / f"v2_mscoco_{subset}_annotations.json"
    questions = read_json(question_path, QUESTIONS.format(part=part), ["questions"])["questions"]
    annotations = read_json(answer_path, ANNOTATIONS.format(part=part), ["annotations"])["annotations"]
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    try:
        answers = {a["question_id"]: a for a in annotations}
        for q in questions:
            annotation = answers.get(q["question_id"])
            if annotation is None:
                left_out.add("question without an annotation", q["question_id"])
                continue
            by_image[q["image_id"]].append(
                {
                    "question_id": q["question_id"],
                    "question": q["question"],
                    "answers": [a["answer"] for a in annotation["answers"]],
                    "answer_type": annotation["answer_type"],
                    "question_type": annotation["question_type"],
                }
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{question_path.name} or {answer_path.name} is not in VQA's form: missing {error}") from None
    return by_image


def splitter(args: argparse.Namespace) -> tuple[Callable[[str, int], str], str]:
    """What gives the split of a photograph from its subset (train2014, val2014) and its COCO id; and the rule in words."""
    beside = args.source / "dataset_coco.json"
    how = args.split or ("karpathy" if args.karpathy or beside.exists() else "holdout")
    if args.karpathy and how != "karpathy":
        raise ConfigError(f"--karpathy is for --split karpathy, got --split {how}")
    if how == "official":
        return lambda subset, _: subset.removesuffix("2014"), "train2014 goes to train, val2014 to val"
    if how == "holdout":
        every = args.holdout_every
        rule = f"photographs with image_id % {every} == 0 go to val, all others to train"
        return lambda _, image_id: "val" if image_id % every == 0 else "train", rule
    path = args.karpathy or beside
    entries = read_json(path, SPLITS_FILE, ["images"])["images"]
    try:
        held_out = {e["cocoid"]: e["split"] for e in entries if e["split"] in ("val", "test")}
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not in Karpathy's form (missing {error}); expected the file from: {SPLITS_FILE}"
        ) from None
    rule = f"photographs of val and test in {path} go to val and test, all others to train"
    return lambda _, image_id: held_out.get(image_id, "train"), rule


def prepare(args: argparse.Namespace) -> None:
    split_of, rule = splitter(args)
    kept_out = read_image_ids(args.leave_out) if args.leave_out else set()
    subsets = [s for s in ("train2014", "val2014") if any(args.source.glob(f"v2_*_{s}_*.json"))]
    if not subsets:
        raise UserError(
            f"{args.source} has no v2_OpenEnded_mscoco_train2014_questions.json, nor val2014's. They come from: {QUESTIONS.format(part='Train')}"
        )
    left_out = LeftOut()
    splits: dict[str, list[Photograph]] = {"train": [], "val": [], "test": []}
    for subset in subsets:
        folder = args.source / subset
        if not folder.is_dir():
            raise UserError(f"{folder} is missing. It comes from: {subset}.zip from https://cocodataset.org/#download")
        for image_id, questions in read_questions(args.source, subset, left_out).items():
            name, split = f"COCO_{subset}_{image_id:012d}.jpg", split_of(subset, image_id)
            if split == "train" and image_id in kept_out:
                left_out.add("training photograph that --leave-out names", name)
            else:
                splits[split].append(
                    Photograph(shard_key(Path(name).stem), folder / name, image_id, questions=tuple(questions))
                )
    print(f"Split: {rule}.", file=sys.stderr)
    write_splits(args.out, "coco", splits, left_out, args.samples_per_shard, IMAGES)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split",
        choices=("karpathy", "holdout", "official"),
        help="who goes to val; karpathy where a dataset_coco.json is given or lies in the source, else holdout",
    )
    parser.add_argument(
        "--karpathy", type=Path, metavar="JSON", help="dataset_coco.json, where it is not in the source folder"
    )
    parser.add_argument(
        "--holdout-every", type=whole_number(2), default=5, metavar="N", help="holdout: image_id %% N == 0 goes to val"
    )
    parser.add_argument(
        "--leave-out",
        type=Path,
        metavar="JSON",
        help="an official-form file (as val_references.json of coco) whose photographs must not be trained on",
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write VQA v2 as shards.", arguments, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
