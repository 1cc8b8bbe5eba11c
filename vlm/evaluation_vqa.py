"""What `vlm evaluate` says about answers beside their scores: by type, calibration, baselines by counting, a page with the pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.answers_page import write_answers_page
from vlm.build import load_sets
from vlm.calibration import calibrated_images, store_temperature, stored_temperature
from vlm.config import Config
from vlm.data.index import ShardSet
from vlm.data.scan import scan
from vlm.data.text import Tokenizer
from vlm.errors import ConfigError, UserError
from vlm.metrics.baselines import fit_question_type_baseline, majority_answer
from vlm.metrics.calibration import calibrated, fit_temperature, reliability
from vlm.metrics.vqa import accuracy, normalize_answer
from vlm.model.pretrained import load_metadata
from vlm.tasks.task import Record, Task
from vlm.tasks.vqa import PromptedVqa
from vlm.tasks.vqa_task import VqaTask, by_type
from vlm.tasks.yes_no import YesNoJudge, YesNoWeights, as_facts, fit_weights, make_judge
from vlm.train.report import number, say

PAGE = "answers.html"


class AnswersEvaluation:
    """The answers of a checkpoint on the sets of a split. Does nothing for a task that does not answer questions."""

    def __init__(
        self, task: Task, tokenizer: Tokenizer, checkpoint: Path, given: Path, split: str, calibrate: bool
    ) -> None:
        """given: the checkpoint as it was named. calibrate: the temperature, and what yes or no is decided by, are fitted on these answers, and
        stored with the checkpoint.

        Raises:
            ConfigError: it cannot be calibrated so.
        """
        self.task = task if isinstance(task, VqaTask) else None
        self.folder, self.split, self.calibrate = checkpoint, split, calibrate
        self.judge: YesNoJudge | None = None
        self.fitted: tuple[float, list[int], dict[str, Any]] | None = None  # temperature, images, what else is told
        if calibrate and self.task is None:
            raise ConfigError("--calibrate is of answers to questions; give a config with task=vqa.")
        if calibrate and split == "train":
            raise ConfigError("--calibrate wants images that were not trained on; use --split val.")
        if calibrate and (not given.is_dir() or given.resolve() != checkpoint.resolve()):
            raise ConfigError(
                f"--calibrate writes into the checkpoint, and {given} is no folder of one; export it first."
            )
        if self.task is not None:
            metadata = load_metadata(checkpoint)
            self.task.temperature = 1.0 if calibrate else stored_temperature(metadata)
            if isinstance(task, PromptedVqa):
                self.judge = task.judge = make_judge(task.model, tokenizer, metadata, fitting=calibrate)

    def finish(
        self, records: Mapping[str, list[Record]], scores: dict[str, dict[str, Any]], main: bool
    ) -> dict[str, Any]:
        """What results.json says about the answers; with `calibrate` a temperature is fitted (`store` writes it) and the scores brought up to date.

        records, scores: by set. main: whether this rank writes.
        """
        if self.task is None:
            return {}
        everything = [record for found in records.values() for record in found]
        images = [record["image_id"] for record in everything]
        if self.calibrate:
            self._calibrate(everything, sorted(records))
            for name, found in records.items():
                scores[name] |= self.task.evaluate(found)
        known = len(set(self.fitted[1])) if self.fitted else calibrated_images(self.folder, images)
        if known and main:
            more = ", and so do yes and no" if self.judge is not None and self.judge.weights is not None else ""
            say(f"calibrated on {known} of these {len(set(images))} images: their calibration flatters{more}")
        report = {name: self._report(name, found, main) for name, found in records.items()}
        return {"answers": {"temperature": self.task.temperature, "images_calibrated_on": known, "sets": report}}

    def store(self) -> None:
        """Writes what was fitted into the checkpoint, if anything: after the results, which an unwritable checkpoint must not cost.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        if self.fitted is not None:
            store_temperature(self.folder, *self.fitted)
            say(f"stored the calibration in {self.folder}")

    def _calibrate(self, records: Sequence[Record], sets: Sequence[str]) -> None:
        assert self.task is not None
        weights = self._judge_anew(records)
        before = self.task.evaluate(records)
        scored = [r for r in records if r["references"]]
        right = [accuracy(r["answer"], r["references"]) for r in scored]
        try:
            self.task.temperature = fit_temperature([r["probability"] for r in scored], right)
        except ValueError as error:
            raise UserError(f"the answers cannot be calibrated: {error}") from None
        for record in records:
            record["confidence"] = calibrated(record["probability"], self.task.temperature)
        after = self.task.evaluate(records)
        say(
            f"temperature {number(self.task.temperature)} from {len(scored)} answers: mean confidence {number(before['mean_confidence'])} -> "
            f"{number(after['mean_confidence'])} (accuracy {number(after['accuracy'])}), expected calibration error {number(before['ece'])} -> "
            f"{number(after['ece'])}"
        )
        facts = {
            "split": self.split,
            "sets": list(sets),
            "questions": len(scored),
            "accuracy": after["accuracy"],
            "ece_before": before["ece"],
            "ece": after["ece"],
            **as_facts(weights),
        }
        self.fitted = (self.task.temperature, [r["image_id"] for r in scored], facts)

    def _judge_anew(self, records: Sequence[Record]) -> YesNoWeights | None:
        """Fits what yes or no is decided by, and brings the answers up to date; None where they stay the decoder's."""
        assert self.task is not None
        seen = [r for r in records if "evidence" in r and any(map(normalize_answer, r["references"]))]
        wanted = [majority_answer(r["references"]) for r in seen]
        told = [(r, answer == "yes") for r, answer in zip(seen, wanted, strict=True) if answer in ("yes", "no")]
        if not told:
            return None
        seen = [r for r, _ in told]
        weights = fit_weights([r["evidence"] for r in seen], [yes for _, yes in told], [r["image_id"] for r in seen])
        if weights is None:
            say(
                f"yes or no stays the decoder's: {len(seen)} answers do not show that similarity to the image tells more"
            )
            return None
        assert self.judge is not None
        self.judge.weights = weights
        before = self.task.evaluate(seen)["accuracy"]
        for record in (r for r in records if "evidence" in r):
            decided = weights.decide(record["answer"], record["probability"], record["evidence"])
            record["answer"], record["probability"] = decided
        say(
            f"yes or no by similarity and decoder, fitted on {len(seen)} answers, on which it flatters: accuracy {number(before)} -> "
            f"{number(self.task.evaluate(seen)['accuracy'])}"
        )
        return weights

    def _report(self, name: str, records: Sequence[Record], main: bool) -> dict[str, Any]:
        assert self.task is not None
        types = {key: by_type(records, key) for key in ("answer_type", "question_type")}
        scored = [r for r in records if r["references"]]
        right = [accuracy(r["answer"], r["references"]) for r in scored]
        bins = [vars(b) for b in reliability([r["confidence"] for r in scored], right)] if scored else []
        if main:
            for key, found in types.items():
                if found:
                    say(f"{name}, by {key.replace('_', ' ')}:\n{table(found)}")
        return {"by_" + key: found for key, found in types.items()} | {"reliability": bins}

    def unanswered(self, shards: ShardSet, records: Sequence[Record], scores: Mapping[str, Any]) -> list[Record]:
        """Empty answers to a set's questions about images that were left out: an evaluation server wants an answer to every question."""
        if self.task is None or not scores.get("left_out"):
            return []
        answered = {r["question_id"] for r in records}
        asked = (q["question_id"] for record in scan([shards]) for q in record.questions)
        missing = [{"question_id": key, "answer": ""} for key in asked if key not in answered]
        if missing:
            say(f"{len(missing)} questions about images that were left out get an empty answer in predictions.json")
        return missing

    def write_page(
        self, out: Path, sets: Mapping[str, ShardSet], records: Mapping[str, list[Record]], results: Mapping[str, Any]
    ) -> None:
        """answers.html in `out`: right and wrong answers with their pictures."""
        if self.task is not None and any(r["references"] for found in records.values() for r in found):
            write_answers_page(out / PAGE, sets, records, results)
            say(f"wrote {out / PAGE}")


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each type, the commonest first: accuracy, its interval, and the number of questions."""
    rows = sorted(found.items(), key=lambda item: (-item[1]["questions"], item[0]))
    width = max(len(name) for name in found)
    return "\n".join(
        f"  {name:<{width}}  {row['accuracy']:6.2f}  ({row['interval'][0]:6.2f} to {row['interval'][1]:6.2f})  {row['questions']:6d}"
        for name, row in rows
    )


def counting_baselines(config: Config, records: Sequence[Record], name: str) -> dict[str, float]:
    """What counting training answers alone would score: the commonest one, and the commonest for a question's first words."""
    try:
        sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache)
    except UserError as error:  # a model may be scored where its training data are not
        say(f"no baselines by counting training answers: {error}")
        return {}
    records = [r for r in records if r["references"]]
    trained = [q for record in scan(sets) for q in record.questions if q.get("answers")]
    if not records or not trained:
        return {}
    by_words = fit_question_type_baseline([q["question"] for q in trained], [q["answers"] for q in trained])
    guesses = {
        "baseline/commonest_answer": lambda _: by_words.overall,
        "baseline/by_first_words": by_words.answer,
    }
    found = {
        key: 100 * sum(accuracy(guess(r["question"]), r["references"]) for r in records) / len(records)
        for key, guess in guesses.items()
    }
    say(
        f"without any model, {name}: "
        + ", ".join(f"{key.removeprefix('baseline/')} {number(value)}" for key, value in found.items())
    )
    return found
