"""`vlm evaluate` of answers: calibration that is stored and used, scores by type, a page with the pictures, answers to every question."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.answers_page import SHOWN, choose, write_answers_page
from vlm.calibration import CALIBRATED_ON, calibrated_images, store_temperature, stored_temperature
from vlm.cli import main
from vlm.data.shards import ShardWriter, load_index
from vlm.data.synthetic import write_scenes
from vlm.data.walk import walk
from vlm.errors import CheckpointError
from vlm.export import export
from vlm.metrics.vqa import accuracy
from vlm.model.pretrained import load_metadata
from vlm.predictor import Predictor

CONFIG = str(Path(__file__).parents[1] / "configs/finetune/vqa/tiny.yaml")
ANSWERS = ("yes", "no", "2", "red", "blue", "circle")
QUIET = ["--data.workers", "0", "--train.precision", "fp32", "--data.batch-size", "8"]


@pytest.fixture
def model(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a random model that answers from a list."""
    shutil.copytree(checkpoint("vqa", ANSWERS), tmp_path / "model")
    return tmp_path / "model"


def evaluate(model: Path, out: Path, *more: str, val: Path, train: Path | None = None) -> dict[str, Any]:
    folders = ["--data.splits.val", str(val), "--data.splits.train", *([str(train)] if train else [])]
    given = ["--checkpoint", str(model), "--split", "val", "--out", str(out)]
    assert main(["evaluate", CONFIG, *given, *folders, *QUIET, *more]) == 0
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def test_calibration_makes_the_mean_confidence_the_accuracy_and_is_stored(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "scenes", 8, 16)
    train, val = tmp_path / "scenes/train", tmp_path / "scenes/val"
    first = evaluate(model, tmp_path / "before", val=val, train=train)["scores"]["scenes"]
    assert abs(first["mean_confidence"] - first["accuracy"]) > 1
    assert "ece_uncalibrated" not in first
    results = evaluate(model, tmp_path / "after", "--calibrate", val=val, train=train)
    found = results["scores"]["scenes"]
    assert found["accuracy"] == first["accuracy"]
    assert found["mean_confidence"] == pytest.approx(found["accuracy"], abs=1e-3)
    assert found["ece_uncalibrated"] == pytest.approx(first["ece"])
    assert results["answers"]["images_calibrated_on"] == 16
    stored = load_metadata(model)["calibration"]
    assert stored["temperature"] == results["answers"]["temperature"] == stored_temperature(load_metadata(model))
    assert (stored["split"], stored["sets"], stored["questions"]) == ("val", ["scenes"], found["questions"])
    assert sum(b["count"] for b in results["answers"]["sets"]["scenes"]["reliability"]) == found["questions"]
    # Evaluated again, the checkpoint brings its temperature, and the score says that it was fitted on these images.
    capsys.readouterr()
    again = evaluate(model, tmp_path / "again", val=val, train=train)
    assert again["scores"] == results["scores"]
    assert again["answers"]["images_calibrated_on"] == 16
    assert "calibrated on 16 of these 16 images" in capsys.readouterr().err
    image = Image.new("RGB", (40, 30), "red")
    plain = Predictor.load(tmp_path / "model", "cpu")
    said = plain.answer(image, "is there a dog?")
    plain.metadata.pop("calibration")
    del plain.__dict__["_answerer"]
    before = plain.answer(image, "is there a dog?")
    assert said.text == before.text
    assert said.confidence == pytest.approx(before.confidence ** (1 / stored["temperature"]), rel=1e-6)
    # Exported, it stays calibrated; a mean of several models is another model.
    export([model], tmp_path / "one")
    assert stored_temperature(load_metadata(tmp_path / "one")) == stored["temperature"]
    assert (tmp_path / "one" / CALIBRATED_ON).read_bytes() == (model / CALIBRATED_ON).read_bytes()
    export([model, model], tmp_path / "mean")
    assert stored_temperature(load_metadata(tmp_path / "mean")) == 1.0
    assert not (tmp_path / "mean" / CALIBRATED_ON).exists()


def test_calibrating_again_begins_from_the_probabilities(model: Path, tmp_path: Path) -> None:
    """Whatever temperature is stored: the same one is found, and what was before means without any."""
    write_scenes(tmp_path / "scenes", 8, 16)
    found = []
    for name in ("first", "second"):
        evaluate(model, tmp_path / name, "--calibrate", val=tmp_path / "scenes/val")
        found.append(load_metadata(model)["calibration"])
    assert found[0] == found[1]
    assert found[0]["ece_before"] > found[0]["ece"]


def test_scores_do_not_depend_on_the_order_of_the_shards(model: Path, tmp_path: Path) -> None:
    """Nor on who predicted what: intervals are drawn from the records in the order of their keys, in which the predictions are written."""
    results = []
    for name, step in (("forwards", 1), ("backwards", -1)):
        with ShardWriter(tmp_path / name / "val", "mine") as writer:
            for number in list(range(24))[::step]:
                file = io.BytesIO()
                Image.new("RGB", (32, 32), (10 * number, 0, 90)).save(file, "PNG")
                answers = list(ANSWERS) if number % 5 < 2 else ["none of these"]
                asked = [{"question_id": number, "question": "what color?", "answers": answers}]
                writer.write(f"k{number:02d}", file.getvalue(), extension="png", questions=asked, image_id=number)
        results.append(evaluate(model, tmp_path / name, val=tmp_path / name / "val"))
        predictions = json.loads((tmp_path / name / "predictions.json").read_text())
        assert [p["question_id"] for p in predictions] == list(range(24))
    assert 0 < results[0]["scores"]["mine"]["accuracy"] < 100
    assert results[0]["intervals"] == results[1]["intervals"]


def test_scores_by_type_have_intervals_and_are_printed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "scenes", 4, 12)
    results = evaluate(model, tmp_path / "out", val=tmp_path / "scenes/val")
    sets, scores = results["answers"]["sets"]["scenes"], results["scores"]["scenes"]
    printed = capsys.readouterr().err
    for kind, found in sets["by_answer_type"].items():
        assert found["accuracy"] == pytest.approx(scores[f"accuracy/{kind}"])
        low, high = found["interval"]
        assert [low, high] == results["intervals"]["scenes"][f"accuracy/{kind}"]
        assert low <= found["accuracy"] <= high
    questions = json.loads((tmp_path / "scenes/val_annotations.json").read_text())["annotations"]
    assert set(sets["by_question_type"]) == {q["question_type"] for q in questions}
    assert sum(found["questions"] for found in sets["by_question_type"].values()) == scores["questions"]
    assert re.search(r"how many +\d+\.\d\d  \( *\d+\.\d\d to", printed)
    # The official file gives the official scores.
    given = ["--questions", str(tmp_path / "scenes/val_questions.json")]
    given += ["--annotations", str(tmp_path / "scenes/val_annotations.json")]
    assert main(["score", "vqa", *given, "--predictions", str(tmp_path / "out/predictions.json"), "--json"]) == 0
    official = json.loads(capsys.readouterr().out)
    assert official["overall"] == round(scores["accuracy"], 2)
    assert official["perQuestionType"] == {k: round(f["accuracy"], 2) for k, f in sets["by_question_type"].items()}


def test_questions_about_broken_images_get_an_empty_answer(model: Path, tmp_path: Path) -> None:
    """A server wants an answer to every question."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(file, "PNG")
    with ShardWriter(tmp_path / "val", "mine") as writer:
        for number in range(30):
            asked = [{"question_id": number, "question": "what color?", "answers": ["blue"]}]
            image = file.getvalue() if number else file.getvalue()[:60]
            writer.write(f"k{number}", image, extension="png", questions=asked)
    results = evaluate(model, tmp_path / "out", val=tmp_path / "val")
    assert results["scores"]["mine"]["questions"] == 29
    predictions = json.loads((tmp_path / "out/predictions.json").read_text())
    assert sorted(p["question_id"] for p in predictions) == list(range(30))
    assert [p["question_id"] for p in predictions if not p["answer"]] == [0]


def test_the_answer_list_of_a_checkpoint_without_one_is_the_training_questions(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As converted ones are."""
    (model / "answers.json").unlink()
    write_scenes(tmp_path / "scenes", 8, 4)
    val, train = tmp_path / "scenes/val", tmp_path / "scenes/train"
    given = ["--checkpoint", str(model), "--split", "val", "--data.splits.val", str(val), *QUIET]
    nowhere = ["--data.splits.train", str(tmp_path / "nowhere")]
    assert main(["evaluate", CONFIG, *given, *nowhere, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "has no answer list" in said
    assert "--vqa.inference generate" in said
    evaluate(model, tmp_path / "out", "--vqa.min-answer-count", "1", val=val, train=train)
    assert "answers are taken from the questions of" in capsys.readouterr().err
    known = {answer for f in walk(load_index(train)) for q in f.record.questions for answer in q["answers"]}
    predictions = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {p["answer"] for p in predictions} <= known


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "train", "--calibrate"], "were not trained on"),
        (["--split", "val", "--calibrate", "--task", "captioning"], "give a config with task=vqa"),
        (["--split", "val", "--calibrate"], "cannot be calibrated: an accuracy of 0 is outside"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(file, "PNG")
    with ShardWriter(tmp_path / "val", "mine") as writer:
        asked = [{"question_id": 0, "question": "what color?", "answers": ["none of these"]}]
        writer.write("k", file.getvalue(), extension="png", captions=["blue"], questions=asked)
    splits = [f"--data.splits.{name}" for name in ("train", "val")]
    folders = [splits[0], str(tmp_path / "val"), splits[1], str(tmp_path / "val")]
    given = ["evaluate", CONFIG, "--checkpoint", str(model), "--out", str(tmp_path / "out"), *folders, *QUIET, *more]
    assert main(given) > 0
    assert message in capsys.readouterr().err
    assert "calibration" not in load_metadata(model)


def test_the_stored_temperature(model: Path) -> None:
    store_temperature(model, 2.5, [3, 1, 3], {"split": "val"})
    assert load_metadata(model)["calibration"] == {"temperature": 2.5, "split": "val"}
    assert calibrated_images(model, [3, 3, 4]) == 1
    assert not [p for p in model.iterdir() if p.name.startswith(".")]
    for bad in (0, -1, "2", None, [1]):
        with pytest.raises(CheckpointError, match="expected a number above 0"):
            stored_temperature({"calibration": {"temperature": bad}})
    (model / CALIBRATED_ON).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        calibrated_images(model, [1])


def test_a_checkpoint_that_cannot_be_written_costs_no_results(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "scenes", 8, 16)
    (model / CALIBRATED_ON / "in the way").mkdir(parents=True)
    given = ["--checkpoint", str(model), "--split", "val", "--out", str(tmp_path / "out"), "--calibrate"]
    folders = [f"--data.splits.{name}={tmp_path}/scenes/{name}" for name in ("train", "val")]
    assert main(["evaluate", CONFIG, *given, *folders, *QUIET]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert (tmp_path / "out/results.json").exists()
    assert "calibration" not in load_metadata(model)


def test_8_bit_weights_are_scored_and_leave_the_checkpoint(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    write_scenes(tmp_path / "scenes", 8, 4)
    before = (model / "model.safetensors").read_bytes()
    whole, small = (
        evaluate(model, tmp_path / name, *more, val=tmp_path / "scenes/val")
        for name, more in (("whole", []), ("small", ["--int8"]))
    )
    assert (whole["quantized"], small["quantized"]) == (None, "int8")
    confidence = [found["scores"]["scenes"]["mean_confidence"] for found in (whole, small)]
    assert confidence[0] != confidence[1] == pytest.approx(confidence[0], rel=0.2)
    assert (model / "model.safetensors").read_bytes() == before


def test_the_page_shows_confident_wrong_answers_first_and_runs_nothing(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "blue").save(file, "PNG")
    records = []
    with ShardWriter(tmp_path / "val", "<set>") as writer:
        for number in range(700):
            image = file.getvalue() if number else b"none"
            writer.write(f"k{number}", image, extension="png", captions=["blue"])
            records.append(
                {
                    "key": f"k{number}",
                    "question_id": number,
                    "question": f"<script>alert({number})</script> is it?" if number % 2 else "how many?",
                    "question_type": "<b>is it" if number % 2 else "how many",
                    "answer_type": "yes/no" if number % 2 else "number",
                    "answer": "2" if number % 3 else "<i>no</i>",
                    "confidence": (number % 97) / 97,
                    "references": ["2"] * 10,
                }
            )
    chosen = choose({"<set>": records})
    kinds = [example.kind for example in chosen]
    assert kinds == ["wrong"] * len([k for k in kinds if k == "wrong"]) + ["right"] * SHOWN["right"]
    wrong = [example.record["confidence"] for example in chosen if example.kind == "wrong"]
    assert wrong == sorted(wrong, reverse=True)
    assert len(wrong) == min(SHOWN["wrong"], sum(accuracy(r["answer"], r["references"]) == 0 for r in records))
    assert wrong[0] == max(r["confidence"] for r in records if r["answer"] != "2")
    types = [example.record["answer_type"] for example in chosen if example.kind == "right"]
    assert types.count("number") == types.count("yes/no")
    results = {"scores": {"<set>": {"accuracy": 60.0}}, "intervals": {"<set>": {"accuracy": [50.0, 70.0]}}}
    write_answers_page(tmp_path / "page.html", {"<set>": load_index(tmp_path / "val")}, {"<set>": records}, results)
    page = (tmp_path / "page.html").read_text()
    assert len(page) < 9e6
    assert page.count("<figure") == len(chosen)
    assert page.count("data:image/jpeg;base64,") >= len(chosen) - 1
    for forbidden in ("<script", "<i>no</i>", "<b>is", "<set>", "http"):
        assert forbidden not in page
    assert "50.00 to 70.00" in page
    chosen_types = re.findall(r"#(t\d+):checked", page)
    assert all(f"id={name}>" in page and f"for={name}>" in page for name in chosen_types)
    assert len(chosen_types) == 4
