"""Questions as records, and reference files in the official forms, written beside the shards so that `vlm score` can be used on predictions.

SPLIT_references.json is COCO's caption annotation form; SPLIT_questions.json and SPLIT_annotations.json are those of VQA v2.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vlm.errors import UserError
from vlm.files import replace_text

OFFICIAL_ANSWERS = 10


class Described(Protocol):
    """What the reference files need of a photograph."""

    @property
    def image_id(self) -> int | str: ...
    @property
    def captions(self) -> Sequence[str]: ...
    @property
    def questions(self) -> Sequence[Mapping[str, Any]]: ...


def question(question_id: int | str, text: str, answers: Sequence[str]) -> dict[str, Any]:
    """A question record with its types guessed in VQA's manner: by the answer (yes/no, number, other) and by the question's first two words.

    Without answers, as in a test set whose answers only its server has, there is no answer type.
    """
    kinds = {}
    if answers:
        first = answers[0].strip().lower()
        kinds["answer_type"] = (
            "yes/no" if first in ("yes", "no") else "number" if re.fullmatch(r"\d+", first) else "other"
        )
    start = " ".join(text.lower().rstrip(" ?").split()[:2])
    return {"question_id": question_id, "question": text, "answers": list(answers), **kinds, "question_type": start}


def write_references(out: Path, split: str, photographs: Sequence[Described]) -> None:
    """Write the reference files of a split under `out`, and remove those of an earlier run that no longer hold.

    The training split is evaluated by nobody and gets none.
    """
    wanted = photographs if split != "train" else []
    captioned = [p for p in wanted if p.captions]
    asked = [p for p in wanted if p.questions]
    answered = any(q["answers"] for p in asked for q in p.questions)
    _replace(out / f"{split}_references.json", caption_references(captioned) if captioned else None)
    _replace(out / f"{split}_questions.json", question_file(asked) if asked else None)
    _replace(out / f"{split}_annotations.json", answer_file(asked) if answered else None)


def read_image_ids(path: Path) -> set[int | str]:
    """The image ids named by a file of one of these forms; UserError where it is missing or of another form."""
    expected = "a val_questions.json, val_annotations.json or val_references.json written by a prepare.py"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        rows = [row for part in ("images", "questions", "annotations") for row in content.get(part, [])]
        ids = {row.get("image_id", row.get("id")) for row in rows}
    except FileNotFoundError:
        raise UserError(f"{path} is missing; expected {expected}") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be used ({error}); expected {expected}") from None
    if not ids:
        raise UserError(f"{path} names no images; expected {expected}")
    return ids


def caption_references(photographs: Sequence[Described]) -> dict[str, Any]:
    """COCO's caption form: {"images": [{"id"}], "annotations": [{"image_id", "id", "caption"}]}."""
    captions = [(p.image_id, caption) for p in photographs for caption in p.captions]
    return {
        "images": [{"id": p.image_id} for p in photographs],
        "annotations": [
            {"image_id": image, "id": i, "caption": caption} for i, (image, caption) in enumerate(captions)
        ],
    }


def question_file(photographs: Sequence[Described]) -> dict[str, Any]:
    """VQA's question form: {"questions": [{"image_id", "question", "question_id"}]}."""
    return {
        "task_type": "Open-Ended",
        "questions": [
            {"image_id": p.image_id, "question": q["question"], "question_id": q["question_id"]}
            for p in photographs
            for q in p.questions
        ],
    }


def answer_file(photographs: Sequence[Described]) -> dict[str, Any]:
    """VQA's annotation form, of the questions that have answers.

    The answers stand as they were given, so that `vlm score vqa` says what `vlm evaluate` says. Only a single answer is written ten times, which
    makes its accuracy an exact match for the official evaluator too: that leaves one answer out each time, and would have none to compare with.
    """
    return {"annotations": [_annotation(p.image_id, q) for p in photographs for q in p.questions if q["answers"]]}


def _annotation(image_id: int | str, question: Mapping[str, Any]) -> dict[str, Any]:
    given = list(question["answers"])
    answers = given if len(given) > 1 else given * OFFICIAL_ANSWERS
    return {
        "image_id": image_id,
        "question_id": question["question_id"],
        "question_type": question.get("question_type", ""),
        "answer_type": question.get("answer_type", "other"),
        "multiple_choice_answer": Counter(answers).most_common(1)[0][0],
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, 1)],
    }


def _replace(path: Path, content: dict[str, Any] | None) -> None:
    """Writes JSON, or removes the file where there is nothing to say."""
    if content is None:
        path.unlink(missing_ok=True)
    else:
        replace_text(path, json.dumps(content, ensure_ascii=False))
