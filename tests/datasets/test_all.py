"""What every recipe promises: a missing download is named, bad arguments are refused, running again is safe."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CAPTIONS = ["flickr8k", "flickr30k", "coco", "nocaps", "textcaps", "visual_genome", "vizwiz_captions"]
QUESTIONS = ["vqa_v2", "daquar", "easy_vqa", "gqa", "ok_vqa", "pope", "textvqa", "vizwiz_vqa"]
NAMES = [*CAPTIONS, *QUESTIONS, "folder"]
READ_AS_THEY_ARE = ["cc3m", "cc12m", "sbu", "laion"]


def test_every_recipe_is_here_and_none_shadows_hugging_faces_datasets():
    assert sorted(p.parent.name for p in (ROOT / "datasets").glob("*/prepare.py")) == sorted(NAMES)
    assert all((ROOT / "datasets" / name / "README.md").stat().st_size > 500 for name in [*NAMES, *READ_AS_THEY_ARE])
    assert not list((ROOT / "datasets").glob("*.py"))
    assert not list((ROOT / "datasets").glob("*/__init__.py"))


@pytest.mark.parametrize(
    ("name", "present", "missing", "download"),
    [
        ("flickr8k", [], "Flicker8k_Dataset", "Flickr8k_Dataset.zip"),
        ("flickr8k", ["Flicker8k_Dataset/", "Flickr8k_text/"], "Flickr8k.token.txt", "Flickr8k_text.zip"),
        ("coco", [], "dataset_coco.json", "caption_datasets.zip"),
        ("vqa_v2", ["val2014/"], "questions.json", "v2_Questions_Train_mscoco.zip"),
        ("vqa_v2", ["val2014/", "v2_mscoco_val2014_annotations.json"], "questions.json", "v2_Questions_Val_mscoco.zip"),
        ("vqa_v2", ["v2_mscoco_train2014_annotations.json"], "train2014", "train2014.zip"),
        ("daquar", [], "nyu_depth_images", "nyu_depth_images.tar"),
        ("daquar", ["nyu_depth_images/"], "train_images_list.txt", "DAQUAR"),
        ("easy_vqa", [], "questions.json", "pip download"),
        ("visual_genome", [], "VG_100K", "images.zip"),
        ("visual_genome", ["VG_100K/"], "image_data.json", "image_data.json.zip"),
        ("flickr30k", [], "flickr30k-images", "request form"),
        ("flickr30k", ["flickr30k-images/"], "dataset_flickr30k.json", "caption_datasets.zip"),
        ("nocaps", [], "nocaps_val_4500_captions.json", "https://nocaps.org/download"),
        ("textcaps", [], "TextCaps_0.1_train.json", "https://textvqa.org/textcaps/dataset"),
        ("vizwiz_captions", [], "annotations/train.json", "annotations.zip"),
        ("ok_vqa", [], "OpenEnded_mscoco_train2014_questions.json", "okvqa.allenai.org"),
        ("ok_vqa", ["v2_mscoco_val2014_annotations.json"], "train2014_questions.json", "okvqa.allenai.org"),
        (
            "ok_vqa",
            ["mscoco_val2014_annotations.json", "val2014/"],
            "val2014_questions.json",
            "val2014_questions.json.zip",
        ),
        ("gqa", [], "questions/train_balanced_questions.json", "questions1.2.zip"),
        ("textvqa", [], "TextVQA_0.5.1_val.json", "https://textvqa.org/dataset"),
        ("vizwiz_vqa", [], "Annotations/test.json", "Annotations.zip"),
        ("pope", [], "coco_pope_adversarial.json", "https://github.com/AoiDragon/POPE"),
    ],
)
def test_a_missing_file_names_its_download(recipe, tmp_path, capsys, name, present, missing, download):
    source = tmp_path / "source"
    source.mkdir()
    for path in present:
        (source / path).mkdir() if path.endswith("/") else (source / path).write_text("{}")
    assert recipe(name).main(["--source", str(source), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert missing in error
    assert download in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["--source", "x", "--out", "y", "--samples-per-shard", "0"], ["--sauce", "x"]]
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments_exit_2(recipe, name, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        recipe(name).main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_run_by_path_as_a_user_does(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "datasets" / "coco" / "prepare.py"),
        "--source",
        str(tmp_path),
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["coco", "vqa_v2"])
def test_running_twice_gives_identical_bytes(recipe, coco_source, tmp_path, snapshot, name):
    command = ["--source", str(coco_source), "--out", str(tmp_path / "o"), "--samples-per-shard", "3"]
    assert recipe(name).main(command) == 0
    first = snapshot(tmp_path / "o")
    assert recipe(name).main(command) == 0
    assert snapshot(tmp_path / "o") == first


def test_another_split_leaves_no_photograph_where_it_was(recipe, coco_source, tmp_path, snapshot):
    command = ["--source", str(coco_source), "--out", str(tmp_path / "o"), "--split"]
    assert recipe("vqa_v2").main([*command, "karpathy"]) == 0
    assert (tmp_path / "o" / "test").exists()
    assert recipe("vqa_v2").main([*command, "official"]) == 0
    assert {p.split("/")[0] for p in snapshot(tmp_path / "o")} == {
        "train",
        "val",
        "val_questions.json",
        "val_annotations.json",
    }


def test_a_failed_run_leaves_the_earlier_output_untouched(recipe, coco_source, tmp_path, snapshot, monkeypatch):
    command = ["--source", str(coco_source), "--out", str(tmp_path / "o")]
    assert recipe("coco").main(command) == 0
    before = snapshot(tmp_path / "o")
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "COCO_val2014_000000000013.jpg":
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert recipe("coco").main(command) == 1
    monkeypatch.undo()
    assert snapshot(tmp_path / "o") == before
