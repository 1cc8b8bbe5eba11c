"""OK-VQA: the official questions, annotations and COCO photographs to shards, one record a photograph. See README.md beside this file."""

import sys
from collections.abc import Sequence
from functools import partial

from vlm.data.coco_questions import QuestionSet, arguments, prepare
from vlm.data.prepare import run

OK_VQA = QuestionSet(
    "OpenEnded_mscoco_{subset}_questions.json",
    "mscoco_{subset}_annotations.json",
    questions="OpenEnded_mscoco_{subset}_questions.json.zip from https://okvqa.allenai.org/download.html",
    annotations="mscoco_{subset}_annotations.json.zip from https://okvqa.allenai.org/download.html",
)


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write OK-VQA as shards.", arguments, partial(prepare, OK_VQA), argv)


if __name__ == "__main__":
    sys.exit(main())
