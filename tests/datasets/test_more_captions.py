"""flickr30k, nocaps, textcaps and vizwiz_captions: the official forms, their splits, what is left out and what is refused."""

import json
from pathlib import Path

import pytest

from vlm.files import write_json

MISSING = "listed photograph that is not in the folder"


def _command(source: Path, out: Path, *more: str) -> list[str]:
    return ["--source", str(source), "--out", str(out), *more]


def _source_name(folder: Path) -> str:
    return json.loads((folder / "index.json").read_text())["source"]


@pytest.fixture
def flickr30k(tmp_path, photograph) -> Path:
    """Photographs 100 to 106: 100 to 103 train (102 is not there), 104 val, 105 and 106 test (106 damaged)."""
    source = tmp_path / "flickr30k"
    splits = ["train", "train", "train", "train", "val", "test", "test"]
    entries = []
    for number, split in enumerate(splits, 100):
        photograph(source / "flickr30k-images" / f"{number}.jpg")
        sentences = [{"raw": f" Caption {k} of {number}. ", "sentid": k} for k in range(5)]
        entries.append({"filename": f"{number}.jpg", "split": split, "imgid": number - 100, "sentences": sentences})
    (source / "flickr30k-images" / "102.jpg").unlink()
    (source / "flickr30k-images" / "106.jpg").write_bytes(b"not an image")
    write_json(source / "dataset_flickr30k.json", {"images": entries, "dataset": "flickr30k"})
    return source


def test_flickr30k_in_karpathys_splits(recipe, flickr30k, tmp_path, read_shards, capsys):
    out = tmp_path / "out"
    assert recipe("flickr30k").main(_command(flickr30k, out)) == 0
    assert {s: set(read_shards(out / s)) for s in ("train", "val", "test")} == {
        "train": {"100", "101", "103"},
        "val": {"104"},
        "test": {"105"},
    }
    record = read_shards(out / "val")["104"]
    assert record["captions"] == [f"Caption {k} of 104." for k in range(5)]
    assert record["image"] == (flickr30k / "flickr30k-images" / "104.jpg").read_bytes()
    assert json.loads((out / "test_references.json").read_text())["images"] == [{"id": "105"}]
    printed = capsys.readouterr().out
    assert f"1  {MISSING}, e.g. 102.jpg" in printed
    assert "1  not a readable image file, e.g. 106.jpg" in printed


def test_flickr30k_leaves_out_what_flickr8k_holds_out(recipe, flickr30k, tmp_path, read_shards, capsys):
    """The same photograph is 101_ab in one and 101 in the other; what is evaluated here stays."""
    for split, name in (("val", "101_ab"), ("test", "104_cd")):
        write_json(tmp_path / f"{split}.json", {"images": [{"id": name}], "annotations": []})
    leave_out = ["--leave-out", str(tmp_path / "val.json"), str(tmp_path / "test.json")]
    assert recipe("flickr30k").main(_command(flickr30k, tmp_path / "o", *leave_out)) == 0
    assert set(read_shards(tmp_path / "o" / "train")) == {"100", "103"}
    assert set(read_shards(tmp_path / "o" / "val")) == {"104"}
    assert "1  training photograph that --leave-out names, e.g. 101.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "restval"}, "100.jpg is of split 'restval'"),
        ({"sentences": [{"tokens": ["a"]}]}, "entry 0 is not in Karpathy's form (missing 'raw')"),
    ],
)
def test_flickr30k_refuses_another_form(recipe, flickr30k, tmp_path, capsys, change, message):
    path = flickr30k / "dataset_flickr30k.json"
    content = json.loads(path.read_text())
    content["images"][0] |= change
    path.write_text(json.dumps(content))
    assert recipe("flickr30k").main(_command(flickr30k, tmp_path / "o")) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "caption_datasets.zip" in error
    assert not (tmp_path / "o").exists()


@pytest.fixture
def nocaps(tmp_path, photograph) -> Path:
    """Six photographs, two of each domain; the last is not there."""
    source = tmp_path / "nocaps"
    images = []
    for number in range(6):
        name = f"00{number}a.jpg"
        photograph(source / "validation" / name)
        domain = ("in", "near", "out")[number % 3]
        images.append({"id": number, "open_images_id": name[:-4], "file_name": name, "domain": f"{domain}-domain"})
    (source / "validation" / "005a.jpg").unlink()
    rows = [
        {"image_id": i["id"], "id": 10 * i["id"] + k, "caption": f"{k} {i['id']}"} for i in images for k in range(10)
    ]
    write_json(source / "nocaps_val_4500_captions.json", {"images": images, "annotations": rows, "licenses": []})
    return source


def test_nocaps_is_a_val_split_under_its_official_ids(recipe, nocaps, tmp_path, read_shards, capsys):
    out = tmp_path / "out"
    assert recipe("nocaps").main(_command(nocaps, out)) == 0
    records = read_shards(out / "val")
    assert [records[key]["image_id"] for key in sorted(records)] == [0, 1, 2, 3, 4]
    assert records["002a"]["captions"] == [f"{k} 2" for k in range(10)]
    assert not (out / "train").exists()
    references = json.loads((out / "val_references.json").read_text())
    assert len(references["annotations"]) == 50
    assert f"1  {MISSING}, e.g. 005a.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(("domain", "ids"), [("in", {0, 3}), ("near", {1, 4}), ("out", {2})])
def test_nocaps_by_domain(recipe, nocaps, tmp_path, read_shards, domain, ids):
    assert recipe("nocaps").main(_command(nocaps, tmp_path / "o", "--domain", domain)) == 0
    assert {record["image_id"] for record in read_shards(tmp_path / "o" / "val").values()} == ids
    references = json.loads((tmp_path / "o" / "val_references.json").read_text())
    assert {image["id"] for image in references["images"]} == ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": "far"}, "001a.jpg is of domain 'far'"),
        ({"domain": None}, "001a.jpg is of domain None"),
    ],
)
def test_nocaps_refuses_an_image_without_a_known_domain(recipe, nocaps, tmp_path, capsys, change, message):
    path = nocaps / "nocaps_val_4500_captions.json"
    content = json.loads(path.read_text())
    content["images"][1] |= change
    path.write_text(json.dumps(content))
    assert recipe("nocaps").main(_command(nocaps, tmp_path / "o")) == 1
    assert message in capsys.readouterr().err


def test_nocaps_image_info_has_no_captions_and_is_refused(recipe, nocaps, tmp_path, capsys):
    """nocaps_val_image_info.json, which the page offers too, lists the same images."""
    path = nocaps / "nocaps_val_4500_captions.json"
    content = json.loads(path.read_text())
    del content["annotations"]
    path.write_text(json.dumps(content))
    assert recipe("nocaps").main(_command(nocaps, tmp_path / "o")) == 1
    assert "has no 'annotations' at its top" in capsys.readouterr().err


@pytest.fixture
def textcaps(tmp_path, photograph) -> Path:
    """Train a0, a1 and val b0, all in train_images/, a row for each caption."""
    source = tmp_path / "textcaps"
    for split, images in (("train", ("a0", "a1")), ("val", ("b0",))):
        rows = []
        for image in images:
            photograph(source / "train_images" / f"{image}.jpg")
            texts = [f"A sign that says {k} {image}." for k in range(5)]
            rows += [{"image_id": image, "caption_str": text, "reference_strs": texts} for text in texts]
        write_json(source / f"TextCaps_0.1_{split}.json", {"dataset_name": "textcaps", "data": rows})
    return source


def test_textcaps_gathers_the_captions_of_an_image(recipe, textcaps, tmp_path, read_shards):
    out = tmp_path / "out"
    assert recipe("textcaps").main(_command(textcaps, out)) == 0
    train, val = read_shards(out / "train"), read_shards(out / "val")
    assert (set(train), set(val)) == ({"a0", "a1"}, {"b0"})
    assert train["a1"]["captions"] == [f"A sign that says {k} a1." for k in range(5)]
    assert train["a1"]["image_id"] == "a1"
    assert _source_name(out / "train") == "open_images"
    assert len(json.loads((out / "val_references.json").read_text())["annotations"]) == 5


def test_textcaps_leaves_out_empty_captions(recipe, textcaps, tmp_path, read_shards, capsys):
    rows = [{"image_id": image, "caption_str": text} for image, text in (("a0", " "), ("a0", " A cup. "), ("a1", ""))]
    write_json(textcaps / "TextCaps_0.1_train.json", {"data": rows})
    assert recipe("textcaps").main(_command(textcaps, tmp_path / "o")) == 0
    assert {key: r["captions"] for key, r in read_shards(tmp_path / "o/train").items()} == {"a0": ["A cup."]}
    assert "1  photograph without a caption or question, e.g. a1.jpg" in capsys.readouterr().out


def test_textcaps_needs_one_of_its_files_and_names_the_other(recipe, textcaps, tmp_path, read_shards, capsys):
    (textcaps / "TextCaps_0.1_train.json").unlink()
    (textcaps / "train_images" / "a0.jpg").unlink()
    assert recipe("textcaps").main(_command(textcaps, tmp_path / "o")) == 0
    assert not (tmp_path / "o" / "train").exists()
    assert "TextCaps_0.1_train.json: its train part is not written" in capsys.readouterr().err


def test_textcaps_test_file_has_no_captions_and_is_refused(recipe, textcaps, tmp_path, capsys):
    write_json(textcaps / "TextCaps_0.1_val.json", {"data": [{"image_id": "b0", "set_name": "test"}]})
    assert recipe("textcaps").main(_command(textcaps, tmp_path / "o")) == 1
    assert "TextCaps' form (missing 'caption_str')" in capsys.readouterr().err


def test_textcaps_without_the_folder_of_photographs_names_its_download(recipe, textcaps, tmp_path, capsys):
    (textcaps / "train_images").rename(textcaps / "images")
    assert recipe("textcaps").main(_command(textcaps, tmp_path / "o")) == 1
    assert "train_val_images.zip" in capsys.readouterr().err


@pytest.fixture
def vizwiz(tmp_path, photograph) -> Path:
    """Two photographs a split; of each one's captions one is canned and one was rejected, and train 1 has no other."""
    source = tmp_path / "vizwiz"
    for first, split in ((0, "train"), (2, "val")):
        images, rows = [], []
        for number in range(2):
            name = f"VizWiz_{split}_{number:08d}.jpg"
            photograph(source / split / name)
            images.append({"id": first + number, "file_name": name, "text_detected": False})
            marks = [(True, False), (False, True), *([(False, False)] * 3 if (split, number) != ("train", 1) else [])]
            rows += [
                {"image_id": first + number, "id": k, "caption": f"{k} {name}", "is_precanned": c, "is_rejected": r}
                for k, (c, r) in enumerate(marks)
            ]
        write_json(source / "annotations" / f"{split}.json", {"images": images, "annotations": rows})
    return source


def test_vizwiz_captions_leaves_out_what_the_official_evaluation_passes_over(
    recipe, vizwiz, tmp_path, read_shards, capsys
):
    out = tmp_path / "out"
    assert recipe("vizwiz_captions").main(_command(vizwiz, out)) == 0
    train, val = read_shards(out / "train"), read_shards(out / "val")
    assert (set(train), set(val)) == ({"VizWiz_train_00000000"}, {"VizWiz_val_00000000", "VizWiz_val_00000001"})
    assert train["VizWiz_train_00000000"]["captions"] == [f"{k} VizWiz_train_00000000.jpg" for k in (2, 3, 4)]
    assert val["VizWiz_val_00000001"]["image_id"] == "VizWiz_val_00000001"
    printed = capsys.readouterr().out
    assert "4  caption marked is_precanned, e.g. 0 VizWiz_train_00000000.jpg" in printed
    assert "4  caption marked is_rejected" in printed
    assert "1  photograph without a caption or question, e.g. VizWiz_train_00000001.jpg" in printed


@pytest.mark.parametrize(("part", "key"), [("annotations", "is_rejected"), ("images", "file_name"), ("images", "id")])
def test_vizwiz_captions_refuses_another_form(recipe, vizwiz, tmp_path, capsys, part, key):
    path = vizwiz / "annotations" / "val.json"
    content = json.loads(path.read_text())
    del content[part][0][key]
    path.write_text(json.dumps(content))
    assert recipe("vizwiz_captions").main(_command(vizwiz, tmp_path / "o")) == 1
    error = capsys.readouterr().err
    assert f"'{key}'" in error
    assert "annotations.zip" in error
    assert not (tmp_path / "o").exists()
