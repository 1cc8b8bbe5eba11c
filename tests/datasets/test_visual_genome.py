"""visual_genome: phrases as captions, COCO's held-out images left out."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def source(tmp_path, photograph) -> Path:
    folder = tmp_path / "vg"
    for number in range(1, 13):
        photograph(folder / ("VG_100K" if number % 2 else "VG_100K_2") / f"{number}.jpg")
    images = [{"image_id": n, "coco_id": 100 + n if n > 8 else None} for n in range(1, 14)]
    regions = [
        {"id": n, "regions": [{"phrase": p} for p in (f"a thing {n}", " red car ", "red car", "")]}
        for n in (*range(1, 12), 13)
    ]
    (folder / "image_data.json").write_text(json.dumps(images))
    (folder / "region_descriptions.json").write_text(json.dumps(regions))
    splits = [{"cocoid": 109, "split": "test"}, {"cocoid": 110, "split": "val"}, {"cocoid": 111, "split": "restval"}]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": splits}))
    return folder


def test_phrases_and_honest_splits(recipe, source, tmp_path, read_shards, capsys):
    out = tmp_path / "out"
    command = ["--source", str(source), "--out", str(out), "--holdout-every", "3"]
    assert recipe("visual_genome").main([*command, "--karpathy", str(source / "dataset_coco.json")]) == 0
    train, val = read_shards(out / "train"), read_shards(out / "val")
    assert set(train) | set(val) == {str(n) for n in (*range(1, 9), 11)}
    assert not set(train) & set(val)
    assert val
    record = (train | val)["3"]
    assert record["captions"] == ["a thing 3", "red car"]
    assert record["image_id"] == 3
    printed = capsys.readouterr().out
    assert "2  image of COCO's val or test split, e.g. 9" in printed
    assert "photograph without a caption or question, e.g. 12" in printed
    assert "listed photograph that is not in the folder, e.g. 13" in printed


def test_without_karpathys_split_it_says_what_is_in_it(recipe, source, tmp_path, read_shards, capsys):
    command = ["--source", str(source), "--out", str(tmp_path / "o"), "--holdout-every", "3"]
    assert recipe("visual_genome").main(command) == 0
    assert {"9", "10"} <= set(read_shards(tmp_path / "o/train")) | set(read_shards(tmp_path / "o/val"))
    assert "give --karpathy dataset_coco.json" in capsys.readouterr().err


def test_questions_join_the_phrases_of_their_image(recipe, source, tmp_path, read_shards):
    rows = [
        {"image_id": 12, "qa_id": 900 + k, "question": f"Where is {k}? ", "answer": f"On shelf {k}."} for k in (0, 1)
    ]
    (source / "question_answers.json").write_text(json.dumps([{"id": 12, "qas": rows}, {"id": 3, "qas": []}]))
    command = ["--source", str(source), "--out", str(tmp_path / "o"), "--holdout-every", "3"]
    assert recipe("visual_genome").main(command) == 0
    records = read_shards(tmp_path / "o/train") | read_shards(tmp_path / "o/val")
    assert [q["question"] for q in records["12"]["questions"]] == ["Where is 0?", "Where is 1?"]
    assert records["12"]["questions"][1]["question_id"] == 901
    assert records["12"]["questions"][1]["answers"] == ["on shelf 1"]
    assert not records["3"].get("questions")
    assert records["3"]["captions"] == ["a thing 3", "red car"]


FILES = ["image_data.json", "region_descriptions.json", "question_answers.json", "dataset_coco.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_kind_is_named(recipe, source, tmp_path, capsys, file):
    (source / file).write_text('{"images": [{"x": 1}]}' if file.startswith("dataset") else '[{"x": 1}]')
    karpathy = ["--karpathy", str(source / "dataset_coco.json")]
    assert recipe("visual_genome").main(["--source", str(source), "--out", str(tmp_path / "o"), *karpathy]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "expected" in error
    assert not (tmp_path / "o").exists()
