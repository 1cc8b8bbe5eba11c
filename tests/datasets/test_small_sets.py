"""flickr8k, daquar and easy_vqa: counts by split and what is left out."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def flickr8k(tmp_path, photograph) -> Path:
    source = tmp_path / "flickr8k"
    text = source / "Flickr8k_text"
    text.mkdir(parents=True)
    names = [f"{i}_ab.jpg" for i in range(8)]
    for name in names[:7]:
        photograph(source / "Flicker8k_Dataset" / name)
    lines = [
        f"{name}#{k}\tCaption {k} of {name} ." for name in [*names[:4], *names[5:], "gone.jpg.1"] for k in range(5)
    ]
    (text / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    (text / "Flickr_8k.trainImages.txt").write_text("0_ab.jpg\n1_ab.jpg\n4_ab.jpg\n7_ab.jpg\n")
    (text / "Flickr_8k.devImages.txt").write_text("2_ab.jpg\n")
    (text / "Flickr_8k.testImages.txt").write_text("3_ab.jpg\n")
    return source


def test_flickr8k(recipe, flickr8k, tmp_path, read_shards, capsys):
    out = tmp_path / "out"
    assert recipe("flickr8k").main(["--source", str(flickr8k), "--out", str(out)]) == 0
    assert {s: set(read_shards(out / s)) for s in ("train", "val", "test")} == {
        "train": {"0_ab", "1_ab"},
        "val": {"2_ab"},
        "test": {"3_ab"},
    }
    record = read_shards(out / "val")["2_ab"]
    assert record["captions"] == [f"Caption {k} of 2_ab.jpg ." for k in range(5)]
    assert record["image_id"] == "2_ab"
    printed = capsys.readouterr().out
    assert "2  photograph in no list (--unlisted train adds it), e.g. 5_ab.jpg" in printed
    assert "1  photograph without a caption or question, e.g. 4_ab.jpg" in printed
    assert "1  listed photograph that is not in the folder, e.g. 7_ab.jpg" in printed
    assert "5  captions of a photograph that is not in the folder, e.g. gone.jpg.1" in printed


def test_flickr8k_unlisted_photographs_may_be_trained_on(recipe, flickr8k, tmp_path, read_shards):
    assert (
        recipe("flickr8k").main(["--source", str(flickr8k), "--out", str(tmp_path / "o"), "--unlisted", "train"]) == 0
    )
    assert set(read_shards(tmp_path / "o" / "train")) == {"0_ab", "1_ab", "5_ab", "6_ab"}


def test_flickr8k_without_test_list_has_no_test_split_and_says_so(recipe, flickr8k, tmp_path, capsys):
    (flickr8k / "Flickr8k_text" / "Flickr_8k.testImages.txt").unlink()
    assert recipe("flickr8k").main(["--source", str(flickr8k), "--out", str(tmp_path / "o")]) == 0
    assert not (tmp_path / "o" / "test").exists()
    assert "no test split is written" in capsys.readouterr().err


@pytest.fixture
def daquar(tmp_path, photograph) -> Path:
    source = tmp_path / "daquar"
    for i in range(40):
        photograph(source / "nyu_depth_images" / f"image{i}.png", "PNG")
    lines = []
    for i in range(40):
        lines += [
            f"what is on the desk in the image{i} ?",
            "book, lamp",
            f"how many chairs are on the left image{i} ?",
            "3",
        ]
    lines += ["what is this ?", "nothing", "what is in this image99 ?", "door"]
    (source / "qa.894.raw.train.txt").write_text("\n".join(lines) + "\n")
    (source / "train_images_list.txt").write_text("".join(f"image{i}\n" for i in range(40)))
    return source


def test_daquar_holds_out_by_image_and_reads_the_questions(recipe, daquar, tmp_path, read_shards, capsys):
    assert recipe("daquar").main(["--source", str(daquar), "--out", str(tmp_path / "o")]) == 0
    train, val = read_shards(tmp_path / "o" / "train"), read_shards(tmp_path / "o" / "val")
    assert set(train) | set(val) == {f"image{i}" for i in range(40)}
    assert not set(train) & set(val)
    assert 3 <= len(val) <= 14
    record = (train | val)["image7"]
    assert record["extension"] == "png"
    assert record["questions"] == [
        {
            "question_id": 7000,
            "question": "what is on the desk?",
            "answers": ["book, lamp"],
            "answer_type": "other",
            "question_type": "what is",
        },
        {
            "question_id": 7001,
            "question": "how many chairs are on the left?",
            "answers": ["3"],
            "answer_type": "number",
            "question_type": "how many",
        },
    ]
    printed = capsys.readouterr()
    assert "1  question that names no image, e.g. what is this ?" in printed.out
    assert "1  questions about a photograph that is not in train_images_list.txt, e.g. image99" in printed.out
    assert "no test split is written" in printed.err
    annotations = json.loads((tmp_path / "o" / "val_annotations.json").read_text())["annotations"]
    assert all(len(a["answers"]) == 10 for a in annotations)


def test_daquar_hold_out_does_not_depend_on_the_other_images(recipe, daquar, tmp_path, read_shards):
    assert recipe("daquar").main(["--source", str(daquar), "--out", str(tmp_path / "all")]) == 0
    (daquar / "train_images_list.txt").write_text("".join(f"image{i}\n" for i in range(39, 9, -1)))
    assert recipe("daquar").main(["--source", str(daquar), "--out", str(tmp_path / "part")]) == 0
    assert set(read_shards(tmp_path / "part" / "val")) <= set(read_shards(tmp_path / "all" / "val"))


def test_daquar_with_the_official_test_files(recipe, daquar, tmp_path, read_shards, photograph):
    photograph(daquar / "nyu_depth_images" / "image50.png", "PNG")
    (daquar / "qa.894.raw.test.txt").write_text("what is that in the image50 ?\ntable\n")
    (daquar / "test_images_list.txt").write_text("image50\n")
    assert recipe("daquar").main(["--source", str(daquar), "--out", str(tmp_path / "o")]) == 0
    assert set(read_shards(tmp_path / "o" / "test")) == {"image50"}
    assert len(read_shards(tmp_path / "o" / "train")) == 40
    assert not (tmp_path / "o" / "val").exists()


def test_easy_vqa(recipe, tmp_path, read_shards, photograph):
    data = tmp_path / "wheel" / "easy_vqa" / "data"
    for part, count in (("train", 30), ("test", 3)):
        for i in range(count):
            photograph(data / part / "images" / f"{i}.png", "PNG")
        rows = [[f"is there a circle {k}?", "yes", i] for i in range(count) for k in range(2)]
        (data / part / "questions.json").write_text(json.dumps(rows))
    command = ["--source", str(tmp_path / "wheel"), "--out", str(tmp_path / "o")]
    assert recipe("easy_vqa").main(command) == 0
    train, test = read_shards(tmp_path / "o" / "train"), read_shards(tmp_path / "o" / "test")
    assert (len(train), len(test)) == (30, 3)
    ids = [q["question_id"] for records in (train, test) for r in records.values() for q in r["questions"]]
    assert len(ids) == len(set(ids)) == 66
    assert len({r["image_id"] for records in (train, test) for r in records.values()}) == 33
    assert recipe("easy_vqa").main([*command, "--holdout-every", "4"]) == 0
    val = read_shards(tmp_path / "o" / "val")
    assert 1 <= len(val) <= 15
    assert set(val) | set(read_shards(tmp_path / "o" / "train")) == set(train)
