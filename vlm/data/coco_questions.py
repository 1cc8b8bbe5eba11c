"""The recipe of question sets about COCO's photographs in VQA v2's official form, which OK-VQA has too: one record a photograph.

VQA v2 also asks about photographs of test2015; those answers only its evaluation server has.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.official import add_leave_out, given, read_coco_splits, read_left_out
from vlm.data.prepare import LeftOut, Photograph, read_json, require, shard_key, whole_number, write_splits
from vlm.data.references import question
from vlm.errors import ConfigError, UserError

IMAGES = "train2014.zip and val2014.zip from https://cocodataset.org/#download"
SUBSETS = ("train2014", "val2014")
TESTS = {"test": "test2015", "test-dev": "test-dev2015"}
TEST_PHOTOGRAPHS = "test2015"
TEST_IMAGES = "test2015.zip from https://cocodataset.org/#download"


@dataclass(frozen=True)
class QuestionSet:
    """Where the files of a question set come from. {subset} is train2014, val2014, test2015 or test-dev2015, {part} Train, Val or Test."""

    questions_file: str
    annotations_file: str
    questions: str
    annotations: str

    def questions_path(self, source: Path, subset: str) -> Path:
        """The subset's questions."""
        return source / self.questions_file.format(subset=subset)

    def annotations_path(self, source: Path, subset: str) -> Path:
        """The subset's answers."""
        return source / self.annotations_file.format(subset=subset)


def read_questions(
    question_set: QuestionSet, source: Path, subset: str, left_out: LeftOut
) -> dict[int, list[dict[str, Any]]]:
    """The questions of train2014 or val2014 with their answers, by COCO image id."""
    part = subset.removesuffix("2014").capitalize()
    paths = question_set.questions_path(source, subset), question_set.annotations_path(source, subset)
    names = {"subset": subset, "part": part}
    questions = read_json(paths[0], question_set.questions.format(**names), ["questions"])
    annotations = read_json(paths[1], question_set.annotations.format(**names), ["annotations"])
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    try:
        answers = {given(a, "question_id", int, str): a for a in given(annotations, "annotations", list)}
        for q in given(questions, "questions", list):
            image_id, question_id, text = _asked(q)
            annotation = answers.get(question_id)
            if annotation is None:
                left_out.add("question without an annotation", question_id)
                continue
            by_image[image_id].append(
                {
                    "question_id": question_id,
                    "question": text,
                    "answers": [str(given(a, "answer", str, int)) for a in given(annotation, "answers", list)],
                    "answer_type": given(annotation, "answer_type", str),
                    "question_type": given(annotation, "question_type", str),
                }
            )
    except ValueError as error:
        raise UserError(f"{paths[0].name} or {paths[1].name} is not in VQA's form: {error}") from None
    return by_image


def _asked(row: Any) -> tuple[int, int | str, str]:
    """Image, id and text of a question. Raises ValueError that says what is of another kind."""
    return given(row, "image_id", int), given(row, "question_id", int, str), given(row, "question", str)


def read_test_questions(question_set: QuestionSet, source: Path, subset: str) -> dict[int, list[dict[str, Any]]]:
    """The questions of test2015 or test-dev2015, which have no answers, by COCO image id."""
    path = question_set.questions_path(source, subset)
    download = question_set.questions.format(subset=subset, part="Test")
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    try:
        for q in given(read_json(path, download, ["questions"]), "questions", list):
            image_id, question_id, text = _asked(q)
            by_image[image_id].append(question(question_id, text, ()))
    except ValueError as error:
        raise UserError(f"{path.name} is not in VQA's form: {error}") from None
    return by_image


def splitter(args: argparse.Namespace) -> tuple[Callable[[str, int], str], str]:
    """What gives the split of a photograph from its subset (train2014, val2014) and its COCO id; and the rule in words."""
    beside = args.source / "dataset_coco.json"
    how = args.split or ("karpathy" if args.karpathy or beside.exists() else "holdout")
    if how == "official":
        return lambda subset, _: subset.removesuffix("2014"), "train2014 goes to train, val2014 to val"
    if how == "holdout":
        every = args.holdout_every
        rule = f"photographs with image_id % {every} == 0 go to val, all others to train"
        return lambda _, image_id: "val" if image_id % every == 0 else "train", rule
    path = args.karpathy or beside
    held_out = read_coco_splits(path)
    rule = f"photographs of val and test in {path} go to val and test, all others to train"
    return lambda _, image_id: held_out.get(image_id, "train"), rule


def prepare(question_set: QuestionSet, args: argparse.Namespace) -> None:
    """Write the splits of a question set. Raises UserError for files that are missing or of another form."""
    if args.karpathy and args.split not in (None, "karpathy"):
        raise ConfigError(f"--karpathy is for --split karpathy, got --split {args.split}")
    if args.split in TESTS:
        prepare_test(question_set, args)
        return
    split_of, rule = splitter(args)
    kept_out = read_left_out(args.leave_out)
    finders = question_set.questions_path, question_set.annotations_path
    subsets = [s for s in SUBSETS if any(find(args.source, s).exists() for find in finders)]
    if not subsets:
        raise UserError(
            f"{args.source} has no {question_set.questions_path(args.source, 'train2014').name}, nor val2014's. "
            f"They come from: {question_set.questions.format(part='Train', subset='train2014')}"
        )
    left_out = LeftOut()
    splits: dict[str, list[Photograph]] = {"train": [], "val": [], "test": []}
    for subset in subsets:
        folder = args.source / subset
        if not folder.is_dir():
            raise UserError(f"{folder} is missing. It comes from: {subset}.zip from https://cocodataset.org/#download")
        for image_id, questions in read_questions(question_set, args.source, subset, left_out).items():
            name, split = f"COCO_{subset}_{image_id:012d}.jpg", split_of(subset, image_id)
            if split == "train" and image_id in kept_out:
                left_out.add("training photograph that --leave-out names", name)
            else:
                splits[split].append(
                    Photograph(shard_key(Path(name).stem), folder / name, image_id, questions=tuple(questions))
                )
    sys.stderr.write(f"Split: {rule}.\n")
    write_splits(args.out, "coco", splits, left_out, args.samples_per_shard, IMAGES)


def prepare_test(question_set: QuestionSet, args: argparse.Namespace) -> None:
    """Write test/ of the questions whose answers only the evaluation server has.

    Raises UserError for files that are missing or of another form, ConfigError where it would replace an earlier run's train/ and val/.
    """
    if held := [s for s in ("train", "val") if (args.out / s).exists()]:
        raise ConfigError(
            f"--split {args.split} writes test/ alone, and {args.out} has {held[0]}/ of an earlier run, which it would remove: give another --out"
        )
    questions = read_test_questions(question_set, args.source, TESTS[args.split])
    folder = require(args.source / TEST_PHOTOGRAPHS, TEST_IMAGES)
    photographs = [
        Photograph(shard_key(Path(name).stem), folder / name, image_id, questions=tuple(asked))
        for image_id, asked in questions.items()
        for name in [f"COCO_{TEST_PHOTOGRAPHS}_{image_id:012d}.jpg"]
    ]
    write_splits(args.out, "coco", {"test": photographs}, LeftOut(), args.samples_per_shard, TEST_IMAGES)


def arguments(parser: argparse.ArgumentParser, tests: Iterable[str] = ()) -> None:
    """The options beside those that every recipe has. tests: the test sets of TESTS that the question set has."""
    parser.add_argument(
        "--split",
        choices=("karpathy", "holdout", "official", *tests),
        help="who goes to val; karpathy where a dataset_coco.json is given or lies in the source, else holdout"
        + ("; test and test-dev: their questions alone, whose answers only the server has" if tests else ""),
    )
    parser.add_argument(
        "--karpathy", type=Path, metavar="JSON", help="dataset_coco.json, where it is not in the source folder"
    )
    parser.add_argument(
        "--holdout-every", type=whole_number(2), default=5, metavar="N", help="holdout: image_id %% N == 0 goes to val"
    )
    add_leave_out(parser, "val_references.json of coco")
