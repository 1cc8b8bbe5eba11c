"""Yes or no by the decoder and by the similarity of statement and image: what is fitted, what it decides, and that all ways of asking agree."""

import io
import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.cli import main
from vlm.data.records import Record
from vlm.data.shards import ShardWriter, load_index
from vlm.data.statements import statement
from vlm.data.walk import walk
from vlm.errors import CheckpointError
from vlm.export import export
from vlm.model.pretrained import load_metadata
from vlm.model.ranking import rank_answers
from vlm.predictor import Predictor
from vlm.tasks.vqa import answer_tree
from vlm.tasks.yes_no import Evidence, YesNoWeights, fit_weights, make_judge, stored_weights

CONFIG = str(Path(__file__).parents[2] / "configs/finetune/vqa/tiny.yaml")
THINGS = ("circle", "square", "red circle", "blue square", "small circle", "big red square")


def drawn(count: int, weights: YesNoWeights, seed: int = 0) -> tuple[list[Evidence], list[bool], list[int]]:
    """Evidence and answers that follow the weights."""
    chance = np.random.default_rng(seed)
    seen = [
        Evidence(float(s), float(d))
        for s, d in zip(chance.normal(9, 3, count), chance.normal(0, 1, count), strict=True)
    ]
    odds = [weights.similarity * e.similarity + weights.decoder * e.decoder + weights.offset for e in seen]
    return seen, [bool(chance.random() < 1 / (1 + math.exp(-o))) for o in odds], [*range(count)]


def test_the_weights_that_made_the_answers_are_found() -> None:
    true = YesNoWeights(0.3, 0.8, -2.5)
    found = fit_weights(*drawn(40_000, true))
    assert found is not None
    assert (found.similarity, found.decoder, found.offset) == pytest.approx((0.3, 0.8, -2.5), abs=0.1)


def test_the_fit_is_the_likeliest() -> None:
    """At the maximum of the likelihood no step in any direction is better."""
    seen, yes, images = drawn(400, YesNoWeights(0.4, 0.5, -3.0))
    found = fit_weights(seen, yes, images)
    assert found is not None

    def likelihood(weights: YesNoWeights) -> float:
        odds = np.array(
            [weights.similarity * e.similarity + weights.decoder * e.decoder + weights.offset for e in seen]
        )
        return float(-np.logaddexp(0, np.where(yes, -odds, odds)).sum())

    best = likelihood(found)
    for name, step in (("similarity", 0.01), ("decoder", 0.05), ("offset", 0.1)):
        for sign in (1, -1):
            assert likelihood(replace(found, **{name: getattr(found, name) + sign * step})) < best


@pytest.mark.parametrize("case", ["noise", "one answer", "few"])
def test_nothing_is_fitted_where_the_similarity_tells_nothing(case: str) -> None:
    seen, yes, images = drawn(12 if case == "few" else 300, YesNoWeights(0.0, 1.5, 0.0), seed=3)
    assert fit_weights(seen, [True] * len(seen) if case == "one answer" else yes, images) is None


def test_answers_that_are_all_told_by_the_similarity_have_finite_weights() -> None:
    seen, _, images = drawn(300, YesNoWeights(0, 0, 0))
    found = fit_weights(seen, [e.similarity > 9 for e in seen], images)
    assert found is not None
    assert math.isfinite(found.offset)
    assert all(
        (found.decide("no", 0.5, e)[0] == "yes") == (e.similarity > 9) for e in seen if abs(e.similarity - 9) > 0.2
    )


def test_the_decoder_alone_is_left_as_it_is_and_both_share_what_both_had() -> None:
    chance = random.Random(0)
    for _ in range(200):
        yes, no = (chance.uniform(0.01, 0.5) for _ in range(2))
        decoder, said = math.log(yes / no), ("yes", yes) if yes > no else ("no", no)
        evidence = Evidence(chance.uniform(-10, 10), decoder)
        answer, probability = YesNoWeights(0.0, 1.0, 0.0).decide(*said, evidence)
        assert (answer, probability) == (said[0], pytest.approx(said[1]))
        answer, probability = YesNoWeights(0.5, 1.0, 0.2).decide(*said, evidence)
        odds = 0.5 * evidence.similarity + decoder + 0.2
        assert answer == ("yes" if odds > 0 else "no")
        assert probability == pytest.approx((yes + no) / (1 + math.exp(-abs(odds))))


def test_damaged_weights_are_named() -> None:
    assert stored_weights({}) is None
    assert stored_weights({"calibration": {"temperature": 2.0}}) is None
    for damaged in ([1, 2, 3], {"similarity": 1.0, "decoder": 2.0}, {"similarity": "x", "decoder": 1, "offset": 1}):
        with pytest.raises(CheckpointError, match="expected a number for each of similarity, decoder, offset"):
            stored_weights({"calibration": {"yes_no": damaged}})


@pytest.fixture
def model(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A random model with both witnesses, that answers yes or no."""
    made = checkpoint("pretraining", ("yes", "no"), "a picture of", heads=("contrastive", "language"))
    shutil.copytree(made, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def asked(model: Path, tmp_path: Path) -> Path:
    """A set whose right answers are what the model's own similarity says, as far as it is above that of half of the questions."""
    predictor, chance = Predictor.load(model, "cpu"), random.Random(1)
    images, questions = [], []
    for _ in range(60):
        images.append(Image.new("RGB", (32, 32), tuple(chance.randrange(256) for _ in range(3))))
        questions.append(f"Is there a {chance.choice(THINGS)}?")
    stated = [str(statement(question)) for question in questions]
    alike = (predictor.embed_images(images) * predictor.embed_texts(stated)).sum(1)
    with ShardWriter(tmp_path / "asked/val", "asked") as writer:
        for number, (image, question) in enumerate(zip(images, questions, strict=True)):
            file = io.BytesIO()
            image.save(file, "PNG")
            answer = "yes" if alike[number] > alike.median() else "no"
            entry = {"question_id": number, "question": question, "answers": [answer] * 10}
            other = {"question_id": 100 + number, "question": "what color is it?", "answers": ["no"] * 10}
            writer.write(f"k{number:02d}", file.getvalue(), extension="png", questions=[entry, other], image_id=number)
    return tmp_path / "asked/val"


def evaluate(model: Path, out: Path, val: Path, *more: str) -> dict[int, str]:
    """The answers by question."""
    quiet = ["--data.workers", "0", "--train.precision", "fp32", "--vqa.form", "prompted"]
    quiet += ["--data.question-prompt", "question: {question} answer:"]  # the checkpoint's, which the predictor takes
    given = ["--checkpoint", str(model), "--split", "val", "--out", str(out), "--data.splits.val", str(val)]
    assert main(["evaluate", CONFIG, *given, *quiet, "--data.splits.train", *more]) == 0
    return {p["question_id"]: p["answer"] for p in json.loads((out / "predictions.json").read_text())}


def test_what_the_similarity_knows_is_answered_rightly_once_calibrated(
    model: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = evaluate(model, tmp_path / "before", asked)
    assert stored_weights(load_metadata(model)) is None
    fitted = evaluate(model, tmp_path / "fitted", asked, "--calibrate")
    printed = capsys.readouterr().err
    assert "yes or no by similarity and decoder, fitted on 60 answers" in printed
    assert "their calibration flatters, and so do yes and no" in printed
    right = {p["question_id"]: p["answer"] for p in _wanted(asked)}
    assert sum(fitted[n] == right[n] for n in range(60)) >= 57 > sum(before[n] == right[n] for n in range(60))
    # A question that states nothing keeps the decoder's answer.
    assert all(fitted[100 + n] == before[100 + n] for n in range(60))
    # The stored weights decide the same, whatever is in the batch, and when a single question is asked.
    again = evaluate(model, tmp_path / "again", asked, "--data.batch-size", "7")
    assert again == fitted
    predictor = Predictor.load(model, "cpu")
    for record in _records(asked)[:8]:
        image = Image.open(io.BytesIO(record.image))
        for question in record.questions:
            assert predictor.answer(image, question["question"]).text == again[question["question_id"]]
    # A mean of several models is another model.
    export([model, model], tmp_path / "mean")
    assert stored_weights(load_metadata(tmp_path / "mean")) is None
    export([model], tmp_path / "one")
    assert stored_weights(load_metadata(tmp_path / "one")) == stored_weights(load_metadata(model)) is not None


def test_there_is_evidence_where_the_decoder_says_yes_or_no_and_the_question_states_something(model: Path) -> None:
    """And it is the image's own: the same questions in another order give the same evidence in that order."""
    predictor = Predictor.load(model, "cpu")
    judge = make_judge(predictor.model, predictor.tokenizer, predictor.metadata, fitting=True)
    assert judge is not None
    assert make_judge(predictor.model, predictor.tokenizer, predictor.metadata) is None
    asked = ["Is there a circle?", "Is there a red square?", "What is this?", "Is this a circle?"]
    said = [("yes", 0.5), ("red", 0.5), ("no", 0.5), ("no", 0.5)]
    colors = ("red", "blue", "green", "white")
    with torch.no_grad():
        features = predictor.model.encode_image(
            torch.stack([predictor.transform(Image.new("RGB", (32, 32), color)) for color in colors])
        )
        memory = predictor.model.memory(features.tokens, None, "decoder")
    ids = torch.tensor([[predictor.tokenizer.cls_id]]).repeat(4, 1)

    def evidence(order: list[int]) -> list[Evidence | None]:
        rows = torch.tensor(order)
        parts = features.embedding[rows], memory.select(rows), ids[rows], torch.ones_like(ids[rows], dtype=torch.bool)
        return judge.evidence([said[i] for i in order], [asked[i] for i in order], *parts)

    found = evidence([0, 1, 2, 3])
    assert [e is not None for e in found] == [True, False, False, True]
    other = evidence([3, 2, 1, 0])
    for one, same in ((found[0], other[3]), (found[3], other[0])):
        assert one is not None
        assert same is not None
        assert (one.similarity, one.decoder) == pytest.approx((same.similarity, same.decoder), abs=1e-4)
    tree, words = answer_tree(predictor.tokenizer, ["no", "yes"], 8)
    ranked = rank_answers(predictor.model, memory, ids, None, tree, k=2)[3]
    score = {words[r.answer]: r.score for r in ranked}
    assert found[3] is not None
    assert found[3].decoder == pytest.approx(score["yes"] - score["no"], abs=1e-3)
    alike = predictor.embed_images([Image.new("RGB", (32, 32), "white")]) @ predictor.embed_texts(["a circle"]).T
    assert found[3].similarity == pytest.approx(alike.item() / predictor.model.temperature.item(), abs=1e-3)


def test_the_confidence_is_that_of_the_answer_that_is_given(model: Path, asked: Path, tmp_path: Path) -> None:
    """As the evaluation fits the temperature: after yes and no were judged."""
    evaluate(model, tmp_path / "fitted", asked, "--calibrate")
    results = json.loads((tmp_path / "fitted/results.json").read_text())["scores"]["asked"]
    assert results["mean_confidence"] == pytest.approx(results["accuracy"], abs=1e-3)
    evaluate(model, tmp_path / "again", asked)
    again = json.loads((tmp_path / "again/results.json").read_text())["scores"]["asked"]
    assert again == pytest.approx(results)


def _records(folder: Path) -> list[Record]:
    return [found.record for found in walk(load_index(str(folder)), strict=True) if isinstance(found.record, Record)]


def _wanted(folder: Path) -> list[dict[str, Any]]:
    return [{"question_id": q["question_id"], "answer": q["answers"][0]} for r in _records(folder) for q in r.questions]


@pytest.mark.parametrize("answer", ["one answer", "no word"])
def test_where_nothing_can_be_fitted_yes_and_no_stay_the_decoder_s_and_no_flattery_is_claimed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: str
) -> None:
    """All yes, or, at some questions, answers of which the official normalisation leaves nothing."""
    chance = random.Random(2)
    with ShardWriter(tmp_path / "val", "mine") as writer:
        for number in range(30):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), tuple(chance.randrange(256) for _ in range(3))).save(file, "PNG")
            given = "." if answer == "no word" and number < 20 else "yes"
            asked = [{"question_id": number, "question": "Is there a circle?", "answers": [given] * 10}]
            wrong = {"question_id": 100 + number, "question": "what color is it?", "answers": ["red"] * 10}
            writer.write(f"k{number}", file.getvalue(), extension="png", questions=[*asked, wrong], image_id=number)
    before = evaluate(model, tmp_path / "before", tmp_path / "val")
    assert evaluate(model, tmp_path / "after", tmp_path / "val", "--calibrate") == before
    printed = capsys.readouterr().err
    assert "yes or no stays the decoder's" in printed
    assert "so do yes and no" not in printed
    assert stored_weights(load_metadata(model)) is None


def test_a_checkpoint_without_a_contrastive_head_keeps_its_answers(
    checkpoint: Callable[..., Path], asked: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("vqa", ("yes", "no")), tmp_path / "plain")
    before = evaluate(tmp_path / "plain", tmp_path / "a", asked)
    assert evaluate(tmp_path / "plain", tmp_path / "b", asked, "--calibrate") == before
    assert stored_weights(load_metadata(tmp_path / "plain")) is None
    assert torch.isfinite(torch.tensor(load_metadata(tmp_path / "plain")["calibration"]["temperature"]))
