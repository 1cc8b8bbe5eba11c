"""predictions.json in the form that a data set's own server takes, and that `vlm score` reads it, with VizWiz' own annotation file too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.cli import main
from vlm.data.index import load_index
from vlm.data.records import ShardReader
from vlm.data.shards import write_index
from vlm.files import write_json

CONFIGS = Path(__file__).parents[2] / "configs/finetune"
WORDS = ("yes", "no", "2", "red", "blue")
QUIET = ["--data.workers", "0", "--train.precision", "fp32", "--data.splits.train"]


def evaluate(model: Path, shards: Path, out: Path, task: str = "vqa") -> list[dict[str, Any]]:
    """predictions.json of the shards as the split val."""
    given = ["--checkpoint", str(model), "--split", "val", "--out", str(out), "--data.splits.val", str(shards)]
    assert main(["evaluate", str(CONFIGS / task / "tiny.yaml"), *given, *QUIET]) == 0
    found: list[dict[str, Any]] = json.loads((out / "predictions.json").read_text())
    return found


def score(kind: str, capsys: pytest.CaptureFixture[str], **files: Path | str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["score", kind, *(f"--{name}={value}" for name, value in files.items()), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def vizwiz(tmp_path: Path, photograph: Callable[..., bytes]) -> Path:
    """Thirty photographs of val with one question each; the annotators' answers have an article, which VizWiz' rules keep and VQA's do not."""
    rows = []
    for number in range(30):
        name = f"VizWiz_val_{number:08d}.jpg"
        photograph(tmp_path / "vizwiz/val" / name)
        answers = ["a red", *[WORDS[number % 5]] * 3, *["the red"] * 6]
        said = [{"answer": answer, "answer_confidence": "yes"} for answer in answers]
        rows.append(
            {"image": name, "question": "What is it?", "answers": said, "answer_type": "other", "answerable": 1}
        )
    write_json(tmp_path / "vizwiz/Annotations/val.json", rows)
    return tmp_path / "vizwiz"


def test_vizwiz_answers_name_the_photograph_and_are_scored_with_the_official_file(
    recipe, vizwiz, tmp_path, checkpoint, capsys
):
    out = tmp_path / "out"
    assert recipe("vizwiz_vqa").main(["--source", str(vizwiz), "--out", str(out)]) == 0
    predictions = evaluate(checkpoint("vqa", WORDS), out / "val", tmp_path / "e")
    assert all(set(p) == {"image", "answer"} for p in predictions)
    assert sorted(p["image"] for p in predictions) == [f"VizWiz_val_{n:08d}.jpg" for n in range(30)]
    said, official = tmp_path / "e/predictions.json", vizwiz / "Annotations/val.json"
    prepared = {name: out / f"val_{name}.json" for name in ("questions", "annotations")}
    own = score("vqa", capsys, **prepared, predictions=said, rules="vizwiz")
    assert (
        own["overall"]
        == score("vqa", capsys, questions=official, annotations=official, predictions=said, rules="vizwiz")["overall"]
    )
    right = {f"VizWiz_val_{n:08d}.jpg": WORDS[n % 5] for n in range(30)}
    assert own["overall"] == pytest.approx(
        100 * sum(0.9 * (p["answer"] == right[p["image"]]) for p in predictions) / 30, abs=0.01
    )


def test_gqas_answers_are_in_its_servers_form(recipe, tmp_path, photograph, checkpoint, capsys):
    rows = {}
    for number in range(8):
        photograph(tmp_path / f"gqa/images/n{number}.jpg")
        kinds = {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"}
        rows[f"0{number}"] = {
            "question": "Is it?",
            "imageId": f"n{number}",
            "answer": WORDS[number % 2],
            "types": kinds,
        }
    write_json(tmp_path / "gqa/questions/testdev_balanced_questions.json", rows)
    out = tmp_path / "out"
    assert recipe("gqa").main(["--source", str(tmp_path / "gqa"), "--out", str(out)]) == 0
    write_index(out / "test")  # which goes on saying so
    predictions = evaluate(checkpoint("vqa", WORDS), out / "test", tmp_path / "e")
    assert all(set(p) == {"questionId", "prediction"} and p["prediction"] in WORDS for p in predictions)
    assert sorted(p["questionId"] for p in predictions) == sorted(rows)
    files = {name: out / f"test_{name}.json" for name in ("questions", "annotations")}
    right = sum(p["prediction"] == rows[p["questionId"]]["answer"] for p in predictions)
    scored = score("vqa", capsys, **files, predictions=tmp_path / "e/predictions.json")
    assert scored["overall"] == pytest.approx(100 * right / 8)


def test_a_photograph_that_cannot_be_read_has_an_empty_answer_in_the_servers_form(recipe, vizwiz, tmp_path, checkpoint):
    path = vizwiz / "val/VizWiz_val_00000003.jpg"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\xff\xda") + 14])  # the header alone, which the recipe reads
    out = tmp_path / "out"
    assert recipe("vizwiz_vqa").main(["--source", str(vizwiz), "--out", str(out)]) == 0
    predictions = evaluate(checkpoint("vqa", WORDS), out / "val", tmp_path / "e")
    assert [p["image"] for p in predictions if not p["answer"]] == [path.name]
    assert {tuple(p) for p in predictions} == {("image", "answer")}


def test_vizwiz_captions_have_the_servers_numbers_and_the_question_sets_identity(
    recipe, vizwiz, tmp_path, checkpoint, capsys
):
    names = sorted(path.name for path in (vizwiz / "val").iterdir())
    images = [{"id": 23431 + n, "file_name": name} for n, name in enumerate(names)]
    rows = [
        {
            "image_id": i["id"],
            "id": 5 * i["id"] + k,
            "caption": f"{k} red circles",
            "is_precanned": False,
            "is_rejected": False,
        }
        for i in images
        for k in range(2)
    ]
    write_json(vizwiz / "annotations/val.json", {"images": images, "annotations": rows})
    for name in ("vizwiz_captions", "vizwiz_vqa"):
        assert recipe(name).main(["--source", str(vizwiz), "--out", str(tmp_path / name)]) == 0
    references = json.loads((tmp_path / "vizwiz_captions/val_references.json").read_text())
    assert references["images"] == images
    predictions = evaluate(checkpoint(), tmp_path / "vizwiz_captions/val", tmp_path / "e", "captioning")
    assert sorted(p["image_id"] for p in predictions) == [i["id"] for i in images]
    scored = score(
        "captions",
        capsys,
        references=tmp_path / "vizwiz_captions/val_references.json",
        predictions=tmp_path / "e/predictions.json",
    )
    results = json.loads((tmp_path / "e/results.json").read_text())["scores"]["vizwiz"]
    assert 100 * scored["ROUGE_L"] == pytest.approx(results["ROUGE_L"])
    reader, ids = ShardReader(), []
    for name in ("vizwiz_captions", "vizwiz_vqa"):
        shards = load_index(tmp_path / name / "val")
        ids.append([reader.read(shards.locate(shards.shards[0]), shards.source, row).image_id for row in range(30)])
    assert ids[0] == ids[1]


def test_shards_whose_index_names_no_form_go_on_in_vqas(recipe, vizwiz, tmp_path, checkpoint):
    out = tmp_path / "out"
    assert recipe("vizwiz_vqa").main(["--source", str(vizwiz), "--out", str(out)]) == 0
    index = out / "val/index.json"
    write_json(index, {key: value for key, value in json.loads(index.read_text()).items() if key != "server"})
    predictions = evaluate(checkpoint("vqa", WORDS), out / "val", tmp_path / "e")
    assert {tuple(p) for p in predictions} == {("question_id", "answer")}
    assert sorted(p["question_id"] for p in predictions) == [f"VizWiz_val_{n:08d}.jpg" for n in range(30)]
