"""`vlm score`: official files in, the official numbers out."""

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from vlm.errors import UserError
from vlm.metrics.captions import CiderD, caption_scores, listed, tokenized
from vlm.metrics.files import read_json, read_records, records
from vlm.metrics.image_text import Embedder, score_pairs
from vlm.metrics.java import check_meteor, check_spice, meteor, spice
from vlm.metrics.pope import pope_scores
from vlm.metrics.ptb import tokenize_all
from vlm.metrics.retrieval import retrieval_scores
from vlm.metrics.vqa import Rules, vqa_scores

_QUESTIONS = '{"questions": [{"question_id": 1, "question": "...", ...}]}'
_ANNOTATIONS = '{"annotations": [{"question_id": 1, "answers": [{"answer": "..."}, ...], ...}]}'
_ANSWERS = '[{"question_id": 1, "answer": "..."}]'
_REFERENCES = '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "..."}]}'
_LABELS = f'{_ANNOTATIONS}, or POPE\'s, one a line: {{"question_id": 1, "text": "Is there a ...?", "label": "yes"}}'
_SAID = f'{_ANSWERS}, or POPE\'s, one a line in the order of the questions: {{"question": "...", "answer": "..."}}'
_SIMILARITY = '.npy with an array (images, texts), or .npz with one called "similarity"'
_OWNERS = "a JSON list with the row (from 0) of each text's image"
_IN_VQA = {"image": "question_id", "questionId": "question_id", "prediction": "answer"}  # VizWiz' and GQA's names
_CAPTIONS = '[{"image_id": 1, "caption": "..."}]'


def score_vqa(
    questions: Path | str, annotations: Path | str, predictions: Path | str, rules: Rules = "vqa"
) -> dict[str, Any]:
    """The official VQA result: overall, perAnswerType, perQuestionType, in percent, rounded to two digits.

    rules: whose evaluator, see `vlm.metrics.vqa`. VizWiz' own file may be given as questions and as annotations, predictions in VizWiz' and GQA's
    form too. Raises UserError, naming the file, for one that is missing, not JSON or of another form, and where the predictions do not answer exactly
    the questions.
    """
    return vqa_scores(
        _vqa_records(questions, "questions", _QUESTIONS),
        _vqa_records(annotations, "annotations", _ANNOTATIONS),
        _vqa_records(predictions, None, _ANSWERS),
        rules,
    ).rounded()


def _vqa_records(path: Path | str, key: str | None, form: str) -> list[dict[str, Any]]:
    """A file's records under VQA's names; VizWiz' files are their plain list."""
    content = read_json(path, form)
    found = records(content, None if isinstance(content, list) else key, path, form)
    return [{_IN_VQA[name]: value for name, value in r.items() if name in _IN_VQA} | r for r in found]


def score_captions(
    references: Path | str,
    predictions: Path | str,
    document_frequencies: Path | str | None = None,
    with_meteor: bool = False,
    with_spice: bool = False,
) -> dict[str, float]:
    """Bleu_1..4, ROUGE_L and CIDEr, unrounded, CIDEr not times 100, of COCO files; METEOR and SPICE on request.

    document_frequencies: references whose images give CIDEr its weights, in place of those scored. Raises UserError as
    `score_vqa`; the predictions must hold one caption for every image of the references.
    """
    if with_meteor:
        check_meteor()
    if with_spice:
        check_spice()
    tokens = tokenized(_references(references), _predictions(predictions))
    weights = None if document_frequencies is None else _weights(document_frequencies)
    scores = caption_scores(*tokens, tokenize=False, document_frequencies=weights).corpus()
    if with_meteor:
        scores["METEOR"] = meteor(*tokens).corpus
    if with_spice:
        scores["SPICE"] = spice(*tokens).corpus
    return scores


def score_image_text(
    embedder: Embedder, references: Path | str, predictions: Path | str, images: Path | str
) -> dict[str, float]:
    """image_text_score: how well the predicted captions fit the images of a folder, by a model; see `vlm.metrics.image_text`.

    The references' "images" name the files, where they have "file_name". Raises UserError as `score_captions`.
    """
    content = read_json(references, _REFERENCES)
    listing = content.get("images") if isinstance(content, dict) else None
    names = {
        image.get("id"): image["file_name"]
        for image in (listing if isinstance(listing, list) else [])
        if isinstance(image, dict)
        and isinstance(image.get("id"), (int, str))
        and isinstance(image.get("file_name"), str)
    }
    return {"image_text_score": score_pairs(embedder, _predictions(predictions), images, names)}


def score_pope(annotations: Path | str, predictions: Path | str) -> dict[str, Any]:
    """accuracy, precision, recall, f1 and yes_ratio in percent, overall and for each question_type; see `vlm.metrics.pope`.

    Raises UserError, naming the file, for another form, a label that is neither yes nor no, and answers to other questions.
    """
    asked = read_records(annotations, "annotations", _LABELS)
    labels = [_label(record, annotations) for record in asked]
    said = read_records(predictions, "predictions", _SAID)
    for record in said:
        if not isinstance(record.get("answer"), str):
            raise UserError(f"{predictions}: the record {str(record)[:80]} lacks an answer; expected {_SAID}.")
    if any("question_id" in record for record in said):
        said = _in_order(_question_ids(asked, annotations, _LABELS), said, predictions)
    elif len(said) != len(asked):
        raise UserError(
            f"{predictions}: {len(said)} answers without question_id to {len(asked)} questions; give one each, in their order."
        )
    elif wrong := [row for row, (a, p) in enumerate(zip(asked, said, strict=True)) if _differ(a, p)]:
        raise UserError(
            f"{predictions}: {listed(wrong, 'answer')} (counted from 0) to another question than stands there in {annotations}; keep its order."
        )
    subsets = [kind if isinstance(kind := record.get("question_type"), str) else None for record in asked]
    return pope_scores(labels, [record["answer"] for record in said], subsets)


def score_retrieval(similarity: Path | str, images_of_texts: Path | str | None = None) -> dict[str, float]:
    """Recall in percent at 1, 5 and 10 both ways (`RetrievalScores.named`) of a matrix, an image a row, a text a column; and how many of each.

    images_of_texts: a JSON list, the row of each text's image; without it every image has equally many texts, one image's after the other's (COCO's
    and Flickr30k's: five). Raises UserError for another form, shapes or rows that do not fit, a NaN, and an image without a text.
    """
    scores = _matrix(similarity)
    images, texts = scores.shape
    if images_of_texts is not None:
        owners = read_json(images_of_texts, _OWNERS)
        if not isinstance(owners, list) or not all(type(row) is int for row in owners):
            raise UserError(f"{images_of_texts}: not of the expected form: {_OWNERS}.")
        if len(owners) != texts:
            raise UserError(
                f"{images_of_texts}: {len(owners)} rows for the {texts} texts of {similarity}; give one each."
            )
        if beyond := [row for row in owners if not 0 <= row < images]:
            raise UserError(
                f"{images_of_texts}: {listed(beyond, 'row')} outside the {images} images of {similarity}; rows count from 0: give 0 to {images - 1}."
            )
    elif texts % images:
        raise UserError(
            f"{similarity}: {texts} texts of {images} images, so not every image has equally many: say with --images-of-texts whose each is"
            f" ({_OWNERS}). Images are rows: is it transposed?"
        )
    else:
        owners = np.repeat(np.arange(images), texts // images)
    try:
        found = retrieval_scores(scores, np.arange(images), owners)
    except ValueError as error:
        raise UserError(f"{similarity}: {error}") from None
    return {**found.named(), "images": images, "texts": texts}


def _matrix(path: Path | str) -> NDArray:
    """Nothing in it is run: an array of Python objects, which would be, is refused."""
    try:
        scores: NDArray | np.lib.npyio.NpzFile = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(scores, np.lib.npyio.NpzFile):
            with scores as arrays:
                scores = arrays["similarity"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected {_SIMILARITY}.") from None
    except (OSError, ValueError, EOFError, KeyError, MemoryError, BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); expected {_SIMILARITY}.") from None
    if scores.ndim != 2 or scores.size == 0 or scores.dtype.kind not in "fiu":
        raise UserError(f"{path}: shape {scores.shape} of {scores.dtype}, expected numbers of shape (images, texts).")
    return scores


def _label(record: Mapping[str, Any], path: Path | str) -> bool:
    """Whether "yes" is right: POPE's "label", or the answer that all annotators gave."""
    answers = record.get("answers")
    given = [a.get("answer") if isinstance(a, dict) else a for a in answers] if isinstance(answers, list) else []
    labels = {str(label).strip().lower() for label in (given or [record.get("label")])}
    if labels != {"yes"} and labels != {"no"}:
        raise UserError(
            f"{path}: the record {str(record)[:80]} has no answer that is yes or no alone; expected {_LABELS}."
        )
    return labels == {"yes"}


def _question_ids(found: Sequence[dict[str, Any]], path: Path | str, form: str) -> list[int | str]:
    if wrong := [r for r in found if not isinstance(r.get("question_id"), (int, str))]:
        raise UserError(f"{path}: the record {str(wrong[0])[:80]} lacks a question_id; expected {form}.")
    return [record["question_id"] for record in found]


def _in_order(keys: Sequence[int | str], said: Sequence[dict[str, Any]], path: Path | str) -> list[dict[str, Any]]:
    """The answers in the order of the questions' ids."""
    table = dict(zip(_question_ids(said, path, _SAID), said, strict=True))
    if len(table) < len(said):
        raise UserError(f"{path}: {len(said) - len(table)} answers more than question_ids; keep one each.")
    if missing := [key for key in keys if key not in table]:
        raise UserError(f"{path}: {listed(missing, 'question')} of {len(keys)} without an answer; answer all.")
    known = set(keys)
    if unknown := [key for key in table if key not in known]:
        raise UserError(f"{path}: {listed(unknown, 'question_id')} not among the {len(keys)} questions.")
    if len(known) < len(keys):
        raise UserError(
            f"{path}: the questions' ids repeat, as POPE's files all count from 1; score them one by one, or without question_id."
        )
    return [table[key] for key in keys]


def _differ(asked: Mapping[str, Any], answered: Mapping[str, Any]) -> bool:
    """Where both state the question."""
    texts = asked.get("text"), answered.get("question")
    return all(isinstance(text, str) for text in texts) and texts[0] != texts[1]


def _weights(path: Path | str) -> CiderD:
    captions = list(_references(path).values())
    if not captions:
        raise UserError(f"{path}: no captions; expected {_REFERENCES}.")
    tokens = iter(tokenize_all([caption for image in captions for caption in image]))
    return CiderD([[next(tokens) for _ in image] for image in captions])


def _references(path: Path | str) -> dict[Any, list[str]]:
    """Captions by image, in the order of "images": the order in which pycocoevalcap tokenizes them."""
    content = read_json(path, _REFERENCES)
    captions: defaultdict[Any, list[str]] = defaultdict(list)
    for record in records(content, "annotations", path, _REFERENCES):
        captions[_image_id(record, path, _REFERENCES)].append(record["caption"])
    images = content.get("images")
    order = [image.get("id") for image in images if isinstance(image, dict)] if isinstance(images, list) else []
    order = [image for image in order if isinstance(image, (int, str))]
    known = {image: captions[image] for image in order if image in captions}
    return known | captions


def _predictions(path: Path | str) -> dict[Any, str]:
    captions: dict[Any, str] = {}
    repeated: list[Any] = []
    for record in records(read_json(path, _CAPTIONS), None, path, _CAPTIONS):
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
