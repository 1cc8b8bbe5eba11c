"""Values of another kind in official files: taken where they mean the same, else refused in words, never with a traceback nor Python's own words."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.files import write_json

GQA = {"question": "Is it?", "imageId": "7", "answer": "yes", "types": {"structural": "verify"}}
TEXTVQA = {"question": "what?", "question_id": 1, "image_id": "7", "answers": ["stop"]}
SENTENCES = [{"raw": "Two guys."}]
VQA_ROW = {"image_id": 1, "question_id": 10, "question": "is it?"}
NOTE = {"question_id": 10, "answers": [{"answer": "a"}], "answer_type": "other", "question_type": "is"}
POPE = {"question_id": 1, "image": "COCO_val2014_000000000001.jpg", "text": "Is there a dog?", "label": "yes"}
REGIONS = [{"id": 1, "regions": [{"phrase": "a dog"}]}]
Sources = Callable[[str, Any], Path]


@pytest.fixture
def sources(tmp_path: Path, photograph: Callable[..., bytes]) -> Sources:
    """sources(recipe, content): a download whose one file to be read has this content, all photographs that it may name, and sound other files."""

    def make(name: str, content: Any) -> Path:
        root = tmp_path / "source"
        files: dict[str, dict[str, Any]] = {
            "textvqa": {"TextVQA_0.5.1_val.json": content},
            "textcaps": {"TextCaps_0.1_val.json": content},
            "gqa": {"questions/val_balanced_questions.json": content},
            "flickr30k": {"dataset_flickr30k.json": content},
            "vqa_v2": {
                "v2_OpenEnded_mscoco_val2014_questions.json": content,
                "v2_mscoco_val2014_annotations.json": {"annotations": [NOTE]},
            },
            "vizwiz_vqa": {"Annotations/val.json": content},
            "vizwiz_captions": {"annotations/val.json": content},
            "visual_genome": {"image_data.json": content, "region_descriptions.json": REGIONS},
            "easy_vqa": {"train/questions.json": content, "test/questions.json": content},
        }
        for path, value in files[name].items():
            write_json(root / path, value)
        folders = [
            "train_images",
            "images",
            "flickr30k-images",
            "val2014",
            "val",
            "VG_100K",
            "train/images",
            "test/images",
        ]
        for folder in folders:
            for picture in ("7.jpg", "COCO_val2014_000000000001.jpg"):
                photograph(root / folder / picture)
        return root

    return make


@pytest.mark.parametrize(
    ("name", "content", "image_id"),
    [
        ("textvqa", {"data": [TEXTVQA | {"image_id": 7}]}, "7"),
        ("textcaps", {"data": [{"image_id": 7, "caption_str": "A cup."}]}, "7"),
        ("gqa", {"1": GQA | {"imageId": 7}}, 7),
    ],
)
def test_an_image_id_may_be_a_number(recipe, sources, tmp_path, read_shards, name, content, image_id):
    """The record is the one that its text makes."""
    assert recipe(name).main(["--source", str(sources(name, content)), "--out", str(tmp_path / "o")]) == 0
    assert {key: r["image_id"] for key, r in read_shards(tmp_path / "o/val").items()} == {"7": image_id}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("flickr30k", {"images": None}, "'images' is null, expected a list"),
        ("flickr30k", {"images": {"a": 1}}, """'images' is {"a": 1}, expected a list"""),
        (
            "flickr30k",
            {"images": [{"sentences": SENTENCES, "split": "val", "filename": 7}]},
            "'filename' is 7, expected a text",
        ),
        (
            "flickr30k",
            {"images": [{"sentences": None, "split": "val", "filename": "7.jpg"}]},
            "'sentences' is null, expected a list",
        ),
        ("vqa_v2", {"questions": [VQA_ROW | {"image_id": "1"}]}, """'image_id' is "1", expected a whole number"""),
        ("vqa_v2", {"questions": [VQA_ROW | {"question": None}]}, "'question' is null, expected a text"),
        ("vqa_v2", {"questions": None}, "'questions' is null, expected a list"),
        ("vqa_v2", {"questions": [3]}, "'entry' is 3, expected an object"),
        ("textvqa", {"data": [TEXTVQA | {"answers": None}]}, "'answers' is null, expected a list"),
        ("textvqa", {"data": [TEXTVQA | {"question": 3}]}, "'question' is 3, expected a text"),
        ("textvqa", {"data": None}, "'data' is null, expected a list"),
        ("textcaps", {"data": [{"image_id": "7", "caption_str": None}]}, "'caption_str' is null, expected a text"),
        ("gqa", {"1": GQA | {"types": None}}, "'types' is null, expected an object"),
        ("gqa", {"1": GQA | {"imageId": True}}, "'imageId' is true, expected a text or a whole number"),
        ("gqa", None, "'file' is null, expected an object"),
        ("vizwiz_vqa", [{"image": None, "question": "q"}], "'image' is null, expected a text"),
        (
            "vizwiz_vqa",
            [{"image": "7.jpg", "question": "q", "answers": [{"answer": 3}]}],
            "'answer' is 3, expected a text",
        ),
        (
            "vizwiz_captions",
            {"images": [{"id": "0", "file_name": "7.jpg"}], "annotations": []},
            """'id' is "0", expected a whole number""",
        ),
        ("vizwiz_captions", {"images": [], "annotations": None}, "'annotations' is null, expected a list"),
        ("visual_genome", [{"image_id": "7"}], """'image_id' is "7", expected a whole number"""),
        ("visual_genome", None, "'file' is null, expected a list"),
        ("easy_vqa", None, "'file' is null, expected a list"),
        ("easy_vqa", [["what?", None, 0]], "entry 0 is ['what?', None, 0], expected [question, answer, image number]"),
    ],
)
def test_a_value_of_another_kind_is_named_with_what_was_expected(
    recipe, sources, tmp_path, capsys, name, content, said
):
    assert recipe(name).main(["--source", str(sources(name, content)), "--out", str(tmp_path / "o")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error
    assert error.startswith("error: ")
    assert not re.search(r"NoneType|object is not|\w+Error|attribute", error)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("change", [{"answers": None}, {"answers": [{"answer": None}]}, {"answer_type": None}])
def test_vqa_annotations_of_another_form_are_refused(recipe, sources, tmp_path, capsys, change):
    source = sources("vqa_v2", {"questions": [VQA_ROW]})
    write_json(source / "v2_mscoco_val2014_annotations.json", {"annotations": [NOTE | change]})
    assert recipe("vqa_v2").main(["--source", str(source), "--out", str(tmp_path / "o")]) == 1
    assert re.search(r"'answers?(_type)?' is null, expected", capsys.readouterr().err)


def test_karpathys_splits_of_another_form_are_refused(recipe, sources, tmp_path, capsys):
    source = sources("vqa_v2", {"questions": [VQA_ROW]})
    for images, said in ((None, "'images' is null"), ([1], "'entry' is 1"), ([{"cocoid": None}], "'cocoid' is null")):
        write_json(source / "dataset_coco.json", {"images": images})
        assert recipe("vqa_v2").main(["--source", str(source), "--out", str(tmp_path / "o")]) == 1
        assert f"is not in Karpathy's form ({said}, expected" in capsys.readouterr().err


def test_an_empty_file_of_pope_is_as_one_that_is_not_there(recipe, tmp_path, photograph, read_shards, capsys):
    source = tmp_path / "pope"
    photograph(source / "val2014/COCO_val2014_000000000001.jpg")
    for subset in ("random", "popular", "adversarial"):
        (source / f"coco_pope_{subset}.json").write_text("\n" if subset == "random" else json.dumps(POPE))
    assert recipe("pope").main(["--source", str(source), "--out", str(tmp_path / "o")]) == 0
    assert "coco_pope_random.json holds no question: its random part is not written" in capsys.readouterr().err
    (record,) = read_shards(tmp_path / "o/test").values()
    assert [q["question_id"] for q in record["questions"]] == ["popular-1", "adversarial-1"]
