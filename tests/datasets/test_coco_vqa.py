"""coco and vqa_v2: counts by split, what is left out, and that nothing evaluated in one task is trained on in the other."""

import json
from pathlib import Path

import pytest

LEFT_OUT = "listed photograph that is not in the folder, e.g. COCO_train2014_000000000001.jpg"


def _ids(read_shards, folder: Path) -> dict[str, set[int]]:
    return {
        s: {r["image_id"] for r in read_shards(folder / s).values()}
        for s in ("train", "val", "test")
        if (folder / s).exists()
    }


def test_coco_splits_counts_and_causes(recipe, coco_source, tmp_path, read_shards, capsys):
    out = tmp_path / "out"
    assert recipe("coco").main(["--source", str(coco_source), "--out", str(out), "--samples-per-shard", "2"]) == 0
    assert _ids(read_shards, out) == {"train": {3, 4, 5, 6, 11, 12, 15}, "val": {13}, "test": {14}}
    record = read_shards(out / "val")["COCO_val2014_000000000013"]
    assert record["captions"] == ["caption 0 of 13", "caption 1 of 13"]
    assert record["image"] == (coco_source / "val2014" / "COCO_val2014_000000000013.jpg").read_bytes()
    assert json.loads((out / "train" / "index.json").read_text())["source"] == "coco"
    assert len(list((out / "train").glob("*.tar"))) == 4
    printed = capsys.readouterr().out
    for line in (
        f"1  {LEFT_OUT}",
        "1  not a readable image file, e.g. COCO_val2014_000000000016.jpg",
        "1  photograph without a caption or question, e.g. COCO_train2014_000000000002.jpg",
    ):
        assert line in printed
    assert printed.splitlines()[1].split()[:5] == ["train", "7", "14", "0", "4"]


def test_coco_restval_can_be_left_out(recipe, coco_source, tmp_path, read_shards):
    assert recipe("coco").main(["--source", str(coco_source), "--out", str(tmp_path / "o"), "--restval", "leave"]) == 0
    assert 15 not in _ids(read_shards, tmp_path / "o")["train"]


def test_reference_files_have_the_official_forms(recipe, coco_source, tmp_path):
    assert recipe("coco").main(["--source", str(coco_source), "--out", str(tmp_path / "c")]) == 0
    references = json.loads((tmp_path / "c" / "val_references.json").read_text())
    assert references["images"] == [{"id": 13}]
    assert references["annotations"][1] == {"image_id": 13, "id": 1, "caption": "caption 1 of 13"}
    assert recipe("vqa_v2").main(["--source", str(coco_source), "--out", str(tmp_path / "v")]) == 0
    assert json.loads((tmp_path / "v" / "val_questions.json").read_text())["questions"] == [
        {"image_id": 13, "question": f"what {k}?", "question_id": 13000 + k} for k in range(2)
    ]
    annotation = json.loads((tmp_path / "v" / "val_annotations.json").read_text())["annotations"][0]
    assert [a["answer"] for a in annotation["answers"]] == ["red"] * 7 + ["blue"] * 3
    assert (annotation["question_id"], annotation["multiple_choice_answer"]) == (13000, "red")
    assert not list(tmp_path.glob("*/train_*.json"))


@pytest.mark.parametrize(
    ("arguments", "train", "val"),
    [
        (["--split", "official"], {2, 3, 4, 5, 6}, {11, 12, 13, 14, 15}),
        (["--split", "holdout"], {2, 3, 4, 6, 11, 12, 13, 14}, {5, 15}),
        (["--split", "holdout", "--holdout-every", "3"], {2, 4, 5, 11, 13, 14}, {3, 6, 12, 15}),
        (["--split", "karpathy"], {2, 3, 4, 5, 6, 11, 12, 15}, {13}),
        ([], {2, 3, 4, 5, 6, 11, 12, 15}, {13}),
    ],
)
def test_vqa_splits_by_image(recipe, coco_source, tmp_path, read_shards, arguments, train, val):
    assert recipe("vqa_v2").main(["--source", str(coco_source), "--out", str(tmp_path / "o"), *arguments]) == 0
    ids = _ids(read_shards, tmp_path / "o")
    assert (ids["train"], ids["val"]) == (train, val)
    assert ids.get("test", {14}) == {14}


def test_vqa_groups_questions_by_image_with_ten_answers(recipe, coco_source, tmp_path, read_shards, capsys):
    assert recipe("vqa_v2").main(["--source", str(coco_source), "--out", str(tmp_path / "o")]) == 0
    records = read_shards(tmp_path / "o" / "train")
    assert [q["question_id"] for q in records["COCO_train2014_000000000004"]["questions"]] == [4000, 4001]
    assert records["COCO_train2014_000000000004"]["questions"][0] == {
        "question_id": 4000,
        "question": "what 0?",
        "answers": ["red"] * 7 + ["blue"] * 3,
        "answer_type": "other",
        "question_type": "what",
    }
    assert len(records["COCO_train2014_000000000003"]["questions"]) == 1
    printed = capsys.readouterr().out
    assert "1  question without an annotation, e.g. 3001" in printed
    assert LEFT_OUT in printed


def test_one_subset_alone_is_enough_and_holds_out_without_karpathys_file(recipe, coco_source, tmp_path, read_shards):
    for path in [*coco_source.glob("v2_*_val2014_*"), coco_source / "dataset_coco.json"]:
        path.unlink()
    assert recipe("vqa_v2").main(["--source", str(coco_source), "--out", str(tmp_path / "o")]) == 0
    assert _ids(read_shards, tmp_path / "o") == {"train": {2, 3, 4, 6}, "val": {5}}


def test_no_photograph_is_evaluated_in_one_task_and_trained_on_in_the_other(recipe, coco_source, tmp_path, read_shards):
    for name in ("coco", "vqa_v2"):
        assert recipe(name).main(["--source", str(coco_source), "--out", str(tmp_path / name)]) == 0
    keys = {
        s: {k for n in ("coco", "vqa_v2") if (tmp_path / n / s).exists() for k in read_shards(tmp_path / n / s)}
        for s in ("train", "val", "test")
    }
    assert all(keys.values())
    assert not keys["train"] & (keys["val"] | keys["test"])
    assert not keys["val"] & keys["test"]


def test_leave_out_keeps_the_other_tasks_held_out_photographs_from_training(
    recipe, coco_source, tmp_path, read_shards, capsys
):
    vqa, captions = tmp_path / "vqa", tmp_path / "captions"
    assert recipe("vqa_v2").main(["--source", str(coco_source), "--out", str(vqa), "--split", "holdout"]) == 0
    leave_out = ["--leave-out", str(vqa / "val_questions.json")]
    assert recipe("coco").main(["--source", str(coco_source), "--out", str(captions), *leave_out]) == 0
    assert not _ids(read_shards, vqa)["val"] & _ids(read_shards, captions)["train"]
    assert "2  training photograph that --leave-out names" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["coco", "vqa_v2"])
def test_leave_out_takes_nothing_from_val_and_test(recipe, coco_source, tmp_path, read_shards, name):
    """It is about what is trained on: a benchmark without some of its photographs is another one."""
    named = tmp_path / "held.json"
    named.write_text(json.dumps({"images": [{"id": image_id} for image_id in (3, 13, 14)]}))
    command = ["--source", str(coco_source), "--out", str(tmp_path / "o"), "--leave-out", str(named)]
    assert recipe(name).main(command) == 0
    ids = _ids(read_shards, tmp_path / "o")
    assert (ids["val"], ids["test"]) == ({13}, {14})
    assert 3 not in ids["train"]
    assert 4 in ids["train"]


def test_same_photograph_same_identity_in_both_tasks(recipe, coco_source, tmp_path, read_shards):
    for name in ("coco", "vqa_v2"):
        assert recipe(name).main(["--source", str(coco_source), "--out", str(tmp_path / name)]) == 0
    a, b = (read_shards(tmp_path / name / "val")["COCO_val2014_000000000013"] for name in ("coco", "vqa_v2"))
    assert a["image_id"] == b["image_id"] == 13
    assert a["image"] == b["image"]
    sources = [
        json.loads((tmp_path / name / "val" / "index.json").read_text())["source"] for name in ("coco", "vqa_v2")
    ]
    assert sources == ["coco", "coco"]


def test_a_photograph_in_two_splits_is_refused(recipe, coco_source, tmp_path, capsys):
    path = coco_source / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"].append(content["images"][2] | {"split": "val"})
    path.write_text(json.dumps(content))
    assert recipe("coco").main(["--source", str(coco_source), "--out", str(tmp_path / "o")]) == 1
    assert "each may occur once" in capsys.readouterr().err
