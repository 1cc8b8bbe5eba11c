"""Answers from a recipe through `vlm evaluate`: one definition of accuracy with `vlm score vqa`, and VQA v2's test questions for its server."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.cli import main
from vlm.data.prepare import LeftOut, Photograph, write_splits
from vlm.data.references import answer_file, question, question_file
from vlm.files import write_json
from vlm.metrics.vqa import accuracy, vqa_scores

CONFIG = str(Path(__file__).parents[2] / "configs/finetune/vqa/tiny.yaml")
QUIET = ["--data.workers", "0", "--train.precision", "fp32", "--data.splits.train"]
WORDS = ("yes", "no", "2", "red", "blue")


def evaluate(model: Path, split: str, folder: Path, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """results.json and predictions.json."""
    given = ["--checkpoint", str(model), "--split", split, "--out", str(out), f"--data.splits.{split}", str(folder)]
    assert main(["evaluate", CONFIG, *given, *QUIET]) == 0
    return json.loads((out / "results.json").read_text()), json.loads((out / "predictions.json").read_text())


def test_the_annotation_file_says_what_the_answers_say() -> None:
    """Whatever their number; of one to three annotators, and of several more."""
    few = [
        list(answers) for count in (1, 2, 3) for answers in itertools.product(("Red.", "blue", "a cat"), repeat=count)
    ]
    more = [["red"] * matches + ["blue"] * (count - matches) for count in (4, 7, 9, 10, 11) for matches in range(count)]
    asked = [question(number, "what is it?", answers) for number, answers in enumerate(few + more)]
    photograph = Photograph("k", Path("k.jpg"), 1, questions=tuple(asked))
    questions, annotations = question_file([photograph])["questions"], answer_file([photograph])["annotations"]
    for said in ("red", "Red.", "blue", "the cat"):
        found = vqa_scores(questions, annotations, [{"question_id": q["question_id"], "answer": said} for q in asked])
        expected = {q["question_id"]: 100 * accuracy(said, q["answers"]) for q in asked}
        assert found.per_question == pytest.approx(expected, abs=1e-9)
    written = {a["question_id"]: [answer["answer"] for answer in a["answers"]] for a in annotations}
    assert all(written[q["question_id"]] == q["answers"] for q in asked if len(q["answers"]) > 1)
    assert written[0] == ["Red."] * 10


def test_evaluate_and_score_agree_about_few_answers(
    checkpoint: Callable[..., Path],
    photograph: Callable[..., bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photographs = []
    for number, (first, second) in enumerate(itertools.permutations(WORDS, 2)):
        path = tmp_path / f"{number}.jpg"
        photograph(path)
        answers = [first, second, "circle"][: 2 + number % 2]
        photographs.append(Photograph(str(number), path, number, questions=(question(number, "what is it?", answers),)))
    write_splits(tmp_path / "out", "mine", {"val": photographs}, LeftOut(), 100, "nowhere")
    results, _ = evaluate(checkpoint("vqa", WORDS), "val", tmp_path / "out/val", tmp_path / "evaluation")
    files = [f"--{name}={tmp_path}/out/val_{name}.json" for name in ("questions", "annotations")]
    capsys.readouterr()
    predictions = f"--predictions={tmp_path}/evaluation/predictions.json"
    assert main(["score", "vqa", *files, predictions, "--json"]) == 0
    overall = json.loads(capsys.readouterr().out)["overall"]
    assert overall == round(results["scores"]["mine"]["accuracy"], 2)
    assert 0 < overall < 100


@pytest.fixture
def vqa_test(coco_source: Path, photograph: Callable[..., bytes]) -> Path:
    """VQA v2's questions about photographs 21 to 23 of test2015, of which 21 and 22 are test-dev's, beside the other files; 23 is not there."""
    for subset, images in (("test2015", (21, 22, 23)), ("test-dev2015", (21, 22))):
        rows = [{"image_id": i, "question": f"Is it {k}?", "question_id": 1000 * i + k} for i in images for k in (0, 1)]
        content = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": subset}
        write_json(coco_source / f"v2_OpenEnded_mscoco_{subset}_questions.json", content | {"questions": rows})
    for image_id in (21, 22):
        photograph(coco_source / "test2015" / f"COCO_test2015_{image_id:012d}.jpg")
    return coco_source


@pytest.mark.parametrize("split", ["test", "test-dev"])
def test_vqa_v2_test_questions_without_answers(recipe, vqa_test, tmp_path, read_shards, capsys, split):
    out = tmp_path / "out"
    assert recipe("vqa_v2").main(["--source", str(vqa_test), "--out", str(out), "--split", split]) == 0
    records = read_shards(out / "test")
    assert set(records) == {"COCO_test2015_000000000021", "COCO_test2015_000000000022"}
    record = records["COCO_test2015_000000000022"]
    assert record["image_id"] == 22
    assert record["questions"][1] == {
        "question_id": 22001,
        "question": "Is it 1?",
        "answers": [],
        "question_type": "is it",
    }
    assert sorted(p.name for p in out.iterdir()) == ["test", "test_questions.json"]
    assert json.loads((out / "test/index.json").read_text())["source"] == "coco"
    left_out = "1  listed photograph that is not in the folder, e.g. COCO_test2015_000000000023.jpg"
    assert (left_out in capsys.readouterr().out) == (split == "test")


def test_vqa_v2_predictions_for_the_server(recipe, vqa_test, tmp_path, checkpoint):
    out = tmp_path / "out"
    assert recipe("vqa_v2").main(["--source", str(vqa_test), "--out", str(out), "--split", "test"]) == 0
    results, predictions = evaluate(checkpoint("vqa", WORDS), "test", out / "test", tmp_path / "evaluation")
    assert sorted(p["question_id"] for p in predictions) == [21000, 21001, 22000, 22001]
    assert all(set(p) == {"question_id", "answer"} and p["answer"] in WORDS for p in predictions)
    assert results["scores"]["coco"] == {"questions": 0}
    assert not (tmp_path / "evaluation/answers.html").exists()


def test_vqa_v2_test_does_not_remove_what_is_trained_on(recipe, vqa_test, tmp_path, snapshot, capsys):
    command = ["--source", str(vqa_test), "--out", str(tmp_path / "out")]
    assert recipe("vqa_v2").main(command) == 0
    before = snapshot(tmp_path / "out")
    assert recipe("vqa_v2").main([*command, "--split", "test"]) == 2
    assert "has train/ of an earlier run, which it would remove: give another --out" in capsys.readouterr().err
    assert snapshot(tmp_path / "out") == before


def test_vqa_v2_test_names_what_is_missing(recipe, vqa_test, tmp_path, capsys):
    def refused(*more: str) -> str:
        command = ["--source", str(vqa_test), "--out", str(tmp_path / "o"), "--split", "test", *more]
        assert recipe("vqa_v2").main(command) != 0
        assert not (tmp_path / "o").exists()
        return capsys.readouterr().err

    assert "--karpathy is for --split karpathy, got --split test" in refused(
        "--karpathy", str(vqa_test / "dataset_coco.json")
    )
    (vqa_test / "test2015").rename(vqa_test / "elsewhere")
    assert "test2015.zip from https://cocodataset.org" in refused()
    questions = vqa_test / "v2_OpenEnded_mscoco_test2015_questions.json"
    write_json(questions, {"questions": [{"question": "Is it?"}]})
    assert f"{questions.name} is not in VQA's form: missing 'image_id'" in refused()
    questions.unlink()
    assert "v2_Questions_Test_mscoco.zip" in refused()


def test_ok_vqa_has_no_test_questions(recipe, vqa_test, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe("ok_vqa").main(["--source", str(vqa_test), "--out", str(tmp_path / "o"), "--split", "test"])
    assert "invalid choice: 'test'" in capsys.readouterr().err
