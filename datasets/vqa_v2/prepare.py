"""VQA v2: the official questions, annotations and COCO photographs to shards, one record a photograph. See README.md beside this file."""

import sys
from collections.abc import Sequence
from functools import partial

from vlm.data.coco_questions import TESTS, QuestionSet, arguments, prepare
from vlm.data.prepare import run

VQA_V2 = QuestionSet(
    "v2_OpenEnded_mscoco_{subset}_questions.json",
    "v2_mscoco_{subset}_annotations.json",
    questions="v2_Questions_{part}_mscoco.zip from https://visualqa.org/download.html",
    annotations="v2_Annotations_{part}_mscoco.zip from https://visualqa.org/download.html",
)


def main(argv: Sequence[str] | None = None) -> int:
    return run("Write VQA v2 as shards.", partial(arguments, tests=TESTS), partial(prepare, VQA_V2), argv)


if __name__ == "__main__":
    sys.exit(main())
