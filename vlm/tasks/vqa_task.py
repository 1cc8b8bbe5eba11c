"""What the forms of visual question answering share whatever they answer by: records, confidence, and the official scores.

Letters: B images, T questions, L tokens, D width.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from vlm.data.batch import Batch
from vlm.metrics.baselines import question_type
from vlm.metrics.calibration import calibrated, expected_calibration_error
from vlm.metrics.interval import bootstrap_parts
from vlm.metrics.vqa import accuracy
from vlm.tasks.task import Record, Task


class VqaTask(Task):
    """A task whose records are questions with an answer, its probability, and the confidence that the checkpoint's temperature makes of that."""

    metric = "accuracy"
    temperature = 1.0

    def question_states(self, batch: Batch) -> Tensor:
        """(T, L, D) states of the questions fused with their images."""
        image = self.model.memory(self.encode_image(batch.images).tokens, None, "fusion").select(batch.texts.image)
        return self.model.fuse(self.model.text_view(batch.texts.ids, batch.texts.mask), image)

    def records(self, batch: Batch, answers: Sequence[tuple[str, float]]) -> list[Record]:
        """One a question. answers: (T,) of each the text and its probability."""
        return [
            {
                **source,
                "key": batch.keys[image],
                "image_id": int(batch.image_ids[image]),
                "answer": answer,
                "probability": probability,
                "confidence": calibrated(probability, self.temperature),
                "references": source.get("answers", []),
            }
            for source, image, (answer, probability) in zip(
                batch.sources, batch.texts.image.tolist(), answers, strict=True
            )
        ]

    def evaluate(self, records: Iterable[Record]) -> dict[str, float]:
        """In percent, over all questions that have annotators' answers: official accuracy, also by answer type, mean confidence, and the expected
        calibration error, with a temperature also that without."""
        scored: dict[str, list[float]] = {}
        confidences: list[float] = []
        probabilities: list[float] = []
        for record in records:
            if not record["references"]:  # a test split, whose answers only its server has
                continue
            value = accuracy(record["answer"], record["references"])
            scored.setdefault("accuracy", []).append(value)
            if record.get("answer_type"):
                scored.setdefault(f"accuracy/{record['answer_type']}", []).append(value)
            probabilities.append(record["probability"])
            confidences.append(calibrated(record["probability"], self.temperature))
        scores = {name: 100 * sum(values) / len(values) for name, values in scored.items()}
        if confidences:
            right = scored["accuracy"]
            scores["mean_confidence"] = 100 * sum(confidences) / len(confidences)
            scores["ece"] = 100 * expected_calibration_error(confidences, right)
            if self.temperature != 1.0:
                scores["ece_uncalibrated"] = 100 * expected_calibration_error(probabilities, right)
        return {**scores, "questions": float(len(confidences))}

    def intervals(self, records: Sequence[Record]) -> dict[str, tuple[float, float]]:
        """The accuracy's, over all questions and by answer type; an image is drawn with all its questions."""
        overall, types = by_type(records).get(""), by_type(records, "answer_type")
        named = {f"accuracy/{name}": found["interval"] for name, found in types.items()}
        return named if overall is None else {"accuracy": overall["interval"], **named}

    def official(self, records: Iterable[Record]) -> list[Record]:
        """VQA's form; the server's of another data set is made of it (`vlm.data.official.in_server_form`)."""
        return [{"question_id": r["question_id"], "answer": r["answer"]} for r in records]


def by_type(records: Iterable[Record], key: str | None = None) -> dict[str, Record]:
    """By the questions' `key`, in the order of the alphabet: accuracy and its interval in percent, and the number of questions.

    Those without an answer type are left out; a missing question type is the question's first two words. key: answer_type, question_type, or None
    for all questions as one type "".
    """
    scored = [
        (kind, 100 * accuracy(r["answer"], r["references"]), r["key"])
        for r in records
        if r["references"] and (kind := type_of(r, key)) is not None
    ]
    if not scored:
        return {}
    kinds, values, images = (list(column) for column in zip(*scored, strict=True))
    intervals = bootstrap_parts(values, kinds, images)
    found = {}
    for kind in sorted(set(kinds)):
        own = [value for name, value in zip(kinds, values, strict=True) if name == kind]
        found[kind] = {"accuracy": sum(own) / len(own), "interval": intervals[kind], "questions": len(own)}
    return found


def type_of(record: Record, key: str | None) -> str | None:
    """The record's answer type or question type as `by_type` counts it."""
    if key is None:
        return ""
    if key == "question_type":
        return record.get(key) or question_type(record["question"])
    return record.get(key) or None
