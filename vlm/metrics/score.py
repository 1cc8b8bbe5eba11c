"""`vlm score`: official files in, the official numbers out."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.metrics.captions import caption_scores, listed
from vlm.metrics.vqa import vqa_scores

_QUESTIONS = '{"questions": [{"question_id": 1, "question": "...", ...}]}'
_ANNOTATIONS = '{"annotations": [{"question_id": 1, "answers": [{"answer": "..."}, ...], ...}]}'
_ANSWERS = '[{"question_id": 1, "answer": "..."}]'
_REFERENCES = '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "..."}]}'
_CAPTIONS = '[{"image_id": 1, "caption": "..."}]'


def score_vqa(questions: Path | str, annotations: Path | str, predictions: Path | str) -> dict[str, Any]:
    """The official VQA result: overall, perAnswerType, perQuestionType, in percent, rounded to two digits.

    Raises UserError, naming the file, for one that is missing, not JSON or of another form, and where the predictions
    do not answer exactly the questions.
    """
    return vqa_scores(
        _records(_read(questions, _QUESTIONS), "questions", questions, _QUESTIONS),
        _records(_read(annotations, _ANNOTATIONS), "annotations", annotations, _ANNOTATIONS),
        _records(_read(predictions, _ANSWERS), None, predictions, _ANSWERS),
    ).rounded()


def score_captions(references: Path | str, predictions: Path | str) -> dict[str, float]:
    """Bleu_1..4, ROUGE_L and CIDEr, unrounded, CIDEr not times 100, of COCO files.

    Raises UserError as `score_vqa`; the predictions must hold one caption for every image of the references.
    """
    return caption_scores(_references(references), _predictions(predictions)).corpus()


def format_scores(scores: Mapping[str, Any]) -> str:
    """A table for people: accuracies with two digits, caption metrics with four."""
    digits = 2 if "overall" in scores else 4
    rows: list[tuple[str, float | None]] = []
    for name, value in scores.items():
        if isinstance(value, Mapping):
            rows += [(name, None), *((f"  {inner}", number) for inner, number in value.items())]
        else:
            rows.append((name, value))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(
        name if value is None else f"{name:<{width}}{value:>{digits + 4}.{digits}f}" for name, value in rows
    )


def _read(path: Path | str, form: str) -> Any:
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a JSON file of the form {form}.") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected a JSON file of the form {form}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); expected {form}.") from None


def _records(content: Any, key: str | None, path: Path | str, form: str) -> list[dict[str, Any]]:
    """The list of records in a file's content, below `key` where the form has one."""
    if key is not None:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise UserError(f"{path}: not of the expected form {form}.")
    return content


def _references(path: Path | str) -> dict[Any, list[str]]:
    """Captions by image, in the order of "images": the order in which pycocoevalcap tokenizes them."""
    content = _read(path, _REFERENCES)
    captions: defaultdict[Any, list[str]] = defaultdict(list)
    for record in _records(content, "annotations", path, _REFERENCES):
        captions[_image_id(record, path, _REFERENCES)].append(record["caption"])
    images = content.get("images")
    order = [image.get("id") for image in images if isinstance(image, dict)] if isinstance(images, list) else []
    order = [image for image in order if isinstance(image, (int, str))]
    known = {image: captions[image] for image in order if image in captions}
    return known | captions


def _predictions(path: Path | str) -> dict[Any, str]:
    captions: dict[Any, str] = {}
    repeated: list[Any] = []
    for record in _records(_read(path, _CAPTIONS), None, path, _CAPTIONS):
        image = _image_id(record, path, _CAPTIONS)
        if image in captions:
            repeated.append(image)
        captions[image] = record["caption"]
    if repeated:
        raise UserError(f"{path}: {listed(repeated, 'further caption')} of images that have one; keep one an image.")
    return captions


def _image_id(record: dict[str, Any], path: Path | str, form: str) -> int | str:
    image = record.get("image_id")
    if not isinstance(image, (int, str)) or not isinstance(record.get("caption"), str):
        raise UserError(f"{path}: the record {str(record)[:80]} lacks an image_id or a caption; expected {form}.")
    return image
