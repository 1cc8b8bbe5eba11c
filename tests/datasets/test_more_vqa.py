"""ok_vqa, gqa, textvqa, vizwiz_vqa and pope: the official forms, their splits, what may not be trained on, and that the scorer reads the files."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlm.files import write_json
from vlm.metrics.score import score_vqa

MISSING = "listed photograph that is not in the folder"


def _command(source: Path, out: Path, *more: str) -> list[str]:
    return ["--source", str(source), "--out", str(out), *more]


def _source_name(folder: Path) -> str:
    return json.loads((folder / "index.json").read_text())["source"]


def _score(out: Path, split: str, answer: str) -> dict[str, Any]:
    """The official result of giving every question of a split the same answer."""
    questions = json.loads((out / f"{split}_questions.json").read_text())["questions"]
    write_json(out / "predictions.json", [{"question_id": q["question_id"], "answer": answer} for q in questions])
    return score_vqa(out / f"{split}_questions.json", out / f"{split}_annotations.json", out / "predictions.json")


@pytest.fixture
def ok_vqa(coco_source: Path) -> Path:
    """The files of VQA v2 under OK-VQA's names."""
    for path in coco_source.glob("v2_*.json"):
        path.rename(path.with_name(path.name.removeprefix("v2_")))
    return coco_source


@pytest.mark.parametrize(
    ("split", "train", "val"),
    [("official", {2, 3, 4, 5, 6}, {11, 12, 13, 14, 15}), ("karpathy", {2, 3, 4, 5, 6, 11, 12, 15}, {13})],
)
def test_ok_vqa_has_the_form_and_the_splits_of_vqa_v2(recipe, ok_vqa, tmp_path, read_shards, split, train, val):
    out = tmp_path / "out"
    assert recipe("ok_vqa").main(_command(ok_vqa, out, "--split", split)) == 0
    ids = {s: {r["image_id"] for r in read_shards(out / s).values()} for s in ("train", "val")}
    assert ids == {"train": train, "val": val}
    assert _source_name(out / "train") == "coco"
    assert _score(out, "val", "red")["overall"] == 100


def test_ok_vqa_trains_on_nothing_that_others_evaluate(recipe, ok_vqa, tmp_path, read_shards):
    """--leave-out takes the held-out files of several tasks."""
    for name, image_id in (("captions", 4), ("vqa", 5)):
        write_json(tmp_path / f"{name}.json", {"questions": [{"image_id": image_id}]})
    leave_out = ["--leave-out", str(tmp_path / "captions.json"), str(tmp_path / "vqa.json")]
    assert recipe("ok_vqa").main(_command(ok_vqa, tmp_path / "o", "--split", "official", *leave_out)) == 0
    assert {r["image_id"] for r in read_shards(tmp_path / "o" / "train").values()} == {2, 3, 6}


@pytest.fixture
def gqa(tmp_path, photograph) -> Path:
    """Train 1 to 4 (4 is not there), val 5, testdev n6; two questions each. Photographs 2 and 3 are COCO's 102 (val) and 103 (train)."""
    source = tmp_path / "gqa"
    for part, images in (("train", ("1", "2", "3", "4")), ("val", ("5",)), ("testdev", ("n6",))):
        questions = {}
        for image in images:
            photograph(source / "images" / f"{image}.jpg")
            for k, (kind, answer) in enumerate((("verify", "yes"), ("query", "the shelf"))):
                questions[f"{k}{image}"] = {
                    "question": f"Is it {k}?",
                    "imageId": image,
                    "answer": answer,
                    "fullAnswer": f"{answer}, it is.",
                    "isBalanced": True,
                    "types": {"structural": kind, "semantic": "attr", "detailed": "verifyAttr"},
                }
        write_json(source / "questions" / f"{part}_balanced_questions.json", questions)
    (source / "images" / "4.jpg").unlink()
    write_json(
        source / "image_data.json", [{"image_id": n, "coco_id": 100 + n if n in (2, 3) else None} for n in range(9)]
    )
    entries = [{"cocoid": 102, "split": "val"}, {"cocoid": 103, "split": "train"}]
    write_json(source / "dataset_coco.json", {"images": entries})
    return source


def test_gqa_splits_and_records(recipe, gqa, tmp_path, read_shards, capsys):
    out = tmp_path / "out"
    assert recipe("gqa").main(_command(gqa, out)) == 0
    keys = {s: set(read_shards(out / s)) for s in ("train", "val", "test")}
    assert keys == {"train": {"1", "2", "3"}, "val": {"5"}, "test": {"n6"}}
    record = read_shards(out / "train")["3"]
    assert record["image_id"] == 3
    assert record["questions"][1] == {
        "question_id": "13",
        "question": "Is it 1?",
        "answers": ["the shelf"],
        "answer_type": "other",
        "question_type": "query",
    }
    assert _source_name(out / "train") == "visual_genome"
    assert read_shards(out / "test")["n6"]["image_id"] == "n6"
    assert f"1  {MISSING}, e.g. 4.jpg" in capsys.readouterr().out


def test_gqa_accuracy_is_an_exact_match(recipe, gqa, tmp_path):
    """ "shelf" would be "the shelf" after VQA's normalisation, which GQA has not."""
    assert recipe("gqa").main(_command(gqa, tmp_path / "o")) == 0
    scores = _score(tmp_path / "o", "test", "yes")
    assert (scores["overall"], scores["perQuestionType"]) == (50, {"query": 0, "verify": 100})
    assert _score(tmp_path / "o", "test", "shelf")["overall"] == 0


def test_gqa_does_not_train_on_what_coco_or_another_set_holds_out(recipe, gqa, tmp_path, read_shards, capsys):
    write_json(tmp_path / "held.json", {"images": [{"id": 1}, {"id": 5}]})
    keep_out = ["--karpathy", str(gqa / "dataset_coco.json"), "--leave-out", str(tmp_path / "held.json")]
    assert recipe("gqa").main(_command(gqa, tmp_path / "o", *keep_out)) == 0
    assert set(read_shards(tmp_path / "o" / "train")) == {"3"}
    assert set(read_shards(tmp_path / "o" / "val")) == {"5"}
    assert "2  training photograph that --leave-out or --karpathy keeps out, e.g. 1" in capsys.readouterr().out


def test_gqa_karpathy_needs_visual_genomes_list(recipe, gqa, tmp_path, capsys):
    (gqa / "image_data.json").unlink()
    karpathy = ["--karpathy", str(gqa / "dataset_coco.json")]
    assert recipe("gqa").main(_command(gqa, tmp_path / "o", *karpathy)) == 1
    assert "image_data.json.zip of Visual Genome" in capsys.readouterr().err


@pytest.mark.parametrize("content", [[], {"1": {"question": "x?", "imageId": "5"}}, {"1": {"answer": None}}])
def test_gqa_refuses_another_form(recipe, gqa, tmp_path, capsys, content):
    write_json(gqa / "questions" / "val_balanced_questions.json", content)
    assert recipe("gqa").main(_command(gqa, tmp_path / "o")) == 1
    assert "val_balanced_questions.json is not in GQA's form" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.fixture
def textvqa(tmp_path, photograph) -> Path:
    """Train a0, val b0 (both in train_images/) and test c0, whose answers are not public; two questions each."""
    source = tmp_path / "textvqa"
    for number, (split, image, folder) in enumerate(
        (("train", "a0", "train_images"), ("val", "b0", "train_images"), ("test", "c0", "test_images"))
    ):
        photograph(source / folder / f"{image}.jpg")
        rows = [
            {"question": f"what does {k} say?", "question_id": 10 * number + k, "image_id": image, "set_name": split}
            for k in range(2)
        ]
        for row in rows if split != "test" else []:
            row["answers"] = ["stop"] * 2 + ["go"] * 8
        write_json(source / f"TextVQA_0.5.1_{split}.json", {"dataset_name": "textvqa", "data": rows})
    return source


def test_textvqa_splits_and_the_test_set_without_answers(recipe, textvqa, tmp_path, read_shards):
    out = tmp_path / "out"
    assert recipe("textvqa").main(_command(textvqa, out)) == 0
    keys = {s: set(read_shards(out / s)) for s in ("train", "val", "test")}
    assert keys == {"train": {"a0"}, "val": {"b0"}, "test": {"c0"}}
    assert _source_name(out / "train") == "open_images"
    assert _score(out, "val", "stop")["overall"] == 60
    assert read_shards(out / "test")["c0"]["questions"][1] == {
        "question_id": 21,
        "question": "what does 1 say?",
        "answers": [],
        "question_type": "what does",
    }
    assert [q["question_id"] for q in json.loads((out / "test_questions.json").read_text())["questions"]] == [20, 21]
    assert not (out / "test_annotations.json").exists()


def test_textvqa_and_textcaps_know_their_common_photographs(recipe, textvqa, tmp_path, read_shards):
    rows = [{"image_id": "a0", "caption_str": "A stop sign."}]
    write_json(textvqa / "TextCaps_0.1_train.json", {"data": rows})
    for name in ("textvqa", "textcaps"):
        assert recipe(name).main(_command(textvqa, tmp_path / name)) == 0
    asked, captioned = (read_shards(tmp_path / name / "train")["a0"] for name in ("textvqa", "textcaps"))
    assert (asked["image_id"], asked["image"]) == (captioned["image_id"], captioned["image"])
    assert _source_name(tmp_path / "textvqa/train") == _source_name(tmp_path / "textcaps/train")


def test_textvqa_refuses_another_form_and_another_folder(recipe, textvqa, tmp_path, capsys):
    (textvqa / "test_images").rename(textvqa / "elsewhere")
    assert recipe("textvqa").main(_command(textvqa, tmp_path / "o")) == 1
    assert "test_images.zip" in capsys.readouterr().err
    write_json(textvqa / "TextVQA_0.5.1_train.json", {"data": [{"question": "x?"}]})
    assert recipe("textvqa").main(_command(textvqa, tmp_path / "o")) == 1
    assert "TextVQA_0.5.1_train.json is not in TextVQA's form (missing 'question_id')" in capsys.readouterr().err


@pytest.fixture
def vizwiz(tmp_path, photograph) -> Path:
    """Two photographs a split, of train and val with answers; the second of val is not there."""
    source = tmp_path / "vizwiz"
    for split in ("train", "val", "test"):
        rows = []
        for number in range(2):
            name = f"VizWiz_{split}_{number:08d}.jpg"
            photograph(source / split / name)
            row: dict[str, Any] = {"image": name, "question": "What is this? "}
            if split != "test":
                said = ["unanswerable"] * 3 + ["soup can"] * 7
                row["answers"] = [{"answer": a, "answer_confidence": "maybe"} for a in said]
                row |= {"answer_type": "other", "answerable": 1}
            rows.append(row)
        write_json(source / "Annotations" / f"{split}.json", rows)
    (source / "val" / "VizWiz_val_00000001.jpg").unlink()
    return source


def test_vizwiz_vqa(recipe, vizwiz, tmp_path, read_shards, capsys):
    out = tmp_path / "out"
    assert recipe("vizwiz_vqa").main(_command(vizwiz, out)) == 0
    assert {s: len(read_shards(out / s)) for s in ("train", "val", "test")} == {"train": 2, "val": 1, "test": 2}
    record = read_shards(out / "train")["VizWiz_train_00000001"]
    assert record["image_id"] == "VizWiz_train_00000001"
    assert record["questions"] == [
        {
            "question_id": "VizWiz_train_00000001.jpg",
            "question": "What is this?",
            "answers": ["unanswerable"] * 3 + ["soup can"] * 7,
            "answer_type": "other",
            "question_type": "what is",
        }
    ]
    assert _source_name(out / "train") == "vizwiz"
    assert _score(out, "val", "unanswerable")["overall"] == 90
    assert not (out / "test_annotations.json").exists()
    assert read_shards(out / "test")["VizWiz_test_00000000"]["questions"][0]["answers"] == []
    assert f"1  {MISSING}, e.g. VizWiz_val_00000001.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [{"x": 1}, [{"question": "x?"}], [{"image": "a.jpg", "question": "x?", "answers": 3}]]
)
def test_vizwiz_vqa_refuses_another_form(recipe, vizwiz, tmp_path, capsys, content):
    write_json(vizwiz / "Annotations" / "val.json", content)
    assert recipe("vizwiz_vqa").main(_command(vizwiz, tmp_path / "o")) == 1
    assert "is not in VizWiz' form" in capsys.readouterr().err


@pytest.fixture
def pope(tmp_path, photograph) -> Path:
    """Two photographs in three files of JSON lines, two questions each; every file counts from 1."""
    source = tmp_path / "pope"
    names = [f"COCO_val2014_{image_id:012d}.jpg" for image_id in (42, 131089)]
    for name in names:
        photograph(source / "val2014" / name)
    for subset in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": 2 * i + k + 1,
                "image": name,
                "text": f"Is there a {subset} {k} in the image?",
                "label": label,
            }
            for i, name in enumerate(names)
            for k, label in enumerate(("yes", "no"))
        ]
        (source / f"coco_pope_{subset}.json").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return source


def test_pope_is_a_test_split_of_coco(recipe, pope, tmp_path, read_shards):
    out = tmp_path / "out"
    assert recipe("pope").main(_command(pope, out)) == 0
    assert not (out / "train").exists()
    record = read_shards(out / "test")["COCO_val2014_000000131089"]
    assert record["image_id"] == 131089
    assert _source_name(out / "test") == "coco"
    ids = [q["question_id"] for q in record["questions"]]
    assert ids == [f"{s}-{n}" for s in ("random", "popular", "adversarial") for n in (3, 4)]
    assert record["questions"][3] == {
        "question_id": "popular-4",
        "question": "Is there a popular 1 in the image?",
        "answers": ["no"],
        "answer_type": "yes/no",
        "question_type": "popular",
    }
    scores = _score(out, "test", "yes")
    assert (scores["overall"], scores["perQuestionType"]) == (50, {"adversarial": 50, "popular": 50, "random": 50})


def test_pope_names_its_photographs_for_leave_out(recipe, pope, coco_source, tmp_path, read_shards):
    """COCO's captions are not trained on where POPE asks about the photograph."""
    for subset in ("random", "popular", "adversarial"):
        path = pope / f"coco_pope_{subset}.json"
        path.write_text(path.read_text().replace("000000000042", "000000000011"))
    (pope / "val2014" / "COCO_val2014_000000000042.jpg").rename(pope / "val2014" / "COCO_val2014_000000000011.jpg")
    assert recipe("pope").main(_command(pope, tmp_path / "pope_out")) == 0
    leave_out = ["--leave-out", str(tmp_path / "pope_out" / "test_questions.json")]
    assert recipe("coco").main(_command(coco_source, tmp_path / "c", *leave_out)) == 0
    trained = {r["image_id"] for r in read_shards(tmp_path / "c" / "train").values()}
    assert 12 in trained
    assert 11 not in trained


def test_pope_without_one_of_its_files_says_so(recipe, pope, tmp_path, read_shards, capsys):
    (pope / "coco_pope_random.json").unlink()
    assert recipe("pope").main(_command(pope, tmp_path / "o")) == 0
    assert "coco_pope_random.json: its random part is not written" in capsys.readouterr().err
    assert len(read_shards(tmp_path / "o" / "test")["COCO_val2014_000000000042"]["questions"]) == 4


@pytest.mark.parametrize(
    "line",
    ["[", '{"question_id": 1}', '{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}', "3"],
)
def test_pope_refuses_another_form(recipe, pope, tmp_path, capsys, line):
    (pope / "coco_pope_popular.json").write_text(f"{line}\n")
    assert recipe("pope").main(_command(pope, tmp_path / "o")) == 1
    error = capsys.readouterr().err
    assert "coco_pope_popular.json line 1 is not in POPE's form" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()
