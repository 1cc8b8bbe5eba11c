"""demos/caption.py: one caption a line, in order, nothing else; what is bad is said in one line and spoils nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.predictor import Predictor

ROOT = Path(__file__).parents[2]
Demo = Callable[..., Any]


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint()


def test_one_caption_a_line_in_order(demo: Demo, model: Path, pictures: list[Path]) -> None:
    expected = [s.text for s in Predictor.load(model, "cpu").caption(pictures)]
    assert len(set(expected)) > 1
    done = demo("caption", *pictures, "--model", model)
    assert (done.status, done.out, done.err) == (0, expected, [])
    backwards = demo("caption", *pictures[::-1], "--model", model, "--device", "cpu")
    assert backwards.out == expected[::-1]


def test_folders_and_stdin_name_images_too(demo: Demo, model: Path, pictures: list[Path]) -> None:
    expected = demo("caption", *pictures, "--model", model).out
    folder = pictures[0].parent
    (folder / "notes.txt").write_text("not an image")
    (folder / "inside").mkdir()
    assert demo("caption", folder, "--model", model).out == expected
    listed = "".join(f"{path}\n" for path in pictures[1:]) + "\n"
    done = demo("caption", pictures[0], "-", folder, "--model", model, stdin=listed.encode())
    assert (done.status, done.out) == (0, expected * 2)


def test_names_that_are_not_utf8(demo: Demo, model: Path, pictures: list[Path]) -> None:
    strange = os.path.join(os.fsencode(pictures[0].parent), b"na\xefve \xff.png")
    shutil.copy(pictures[0], strange)
    done = demo("caption", "-", "--model", model, "--json", stdin=strange + b"\n" + b"a\0b.png\n")
    good, bad = map(json.loads, done.out)
    assert os.fsencode(good["image"]) == strange
    assert good["caption"]
    assert "no file can have this name" in bad["error"]
    assert (done.status, len(done.err)) == (1, 1)


def test_json_has_image_caption_and_confidence(demo: Demo, model: Path, pictures: list[Path]) -> None:
    done = demo("caption", *pictures, "--model", model, "--json")
    expected = Predictor.load(model, "cpu").caption(pictures)
    found = [json.loads(line) for line in done.out]
    assert [f["image"] for f in found] == [str(path) for path in pictures]
    assert [f["caption"] for f in found] == [s.text for s in expected]
    assert [f["confidence"] for f in found] == pytest.approx([s.confidence for s in expected], abs=1e-4)
    assert all(0 <= f["confidence"] <= 1 for f in found)


def test_beams_sampling_and_seed(demo: Demo, model: Path, pictures: list[Path]) -> None:
    predictor = Predictor.load(model, "cpu")
    greedy = demo("caption", *pictures, "--model", model, "--beams", 1).out
    assert greedy == [s.text for s in predictor.caption(pictures, beams=1)]
    drawn = [demo("caption", *pictures, "--model", model, "--sample", "--seed", seed).out for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_several_captions_of_each_image(
    demo: Demo, model: Path, pictures: list[Path], bad_pictures: dict[str, Path]
) -> None:
    expected = Predictor.load(model, "cpu").captions(pictures, 2)
    done = demo("caption", *pictures, "--model", model, "--count", 2)
    assert (done.status, done.out) == (0, [s.text for texts in expected for s in texts])
    mixed = [pictures[0], bad_pictures["empty"], pictures[1]]
    done = demo("caption", *mixed, "--model", model, "--count", 2)
    assert (done.status, done.out[2:4], len(done.out)) == (1, ["", ""], 6)
    drawn = demo("caption", *pictures, "--model", model, "--sample", "--count", 4, "--json")
    for line, path in zip(drawn.out, pictures, strict=True):
        found = json.loads(line)
        assert found["image"] == str(path)
        assert {k: found[k] for k in ("caption", "confidence")} == found["captions"][0]
        assert len({c["caption"] for c in found["captions"]}) == 4
    assert "give beams=9" in refused(demo, *pictures, "--model", model, "--count", 9, status=2)


def test_the_draw_and_the_prompt_are_the_users(demo: Demo, model: Path, pictures: list[Path]) -> None:
    predictor = Predictor.load(model, "cpu")
    for options, settings in (
        (["--temperature", 3, "--top-p", 1], {"temperature": 3.0, "top_p": 1.0}),
        (["--top-k", 1], {"top_k": 1}),
    ):
        done = demo("caption", *pictures, "--model", model, "--sample", *options)
        assert done.out == [s.text for s in predictor.caption(pictures, sampled=True, **settings)]
    assert done.out == demo("caption", *pictures, "--model", model, "--beams", 1).out, "the likeliest word is greedy's"
    prompted = demo("caption", *pictures, "--model", model, "--prompt", "a red circle").out
    assert prompted == [s.text for s in predictor.caption(pictures, prompt="a red circle")]
    assert prompted != demo("caption", *pictures, "--model", model).out
    assert "temperature=0.0" in refused(demo, *pictures, "--model", model, "--sample", "--temperature", 0, status=2)


def test_seeds_and_temperatures_that_cannot_be_drawn_with(demo: Demo, model: Path, pictures: list[Path]) -> None:
    def said(*options: object) -> str:
        return refused(demo, *pictures, "--model", model, "--sample", *options, status=2)

    for value in ("nan", "inf"):
        assert f"temperature={value}" in said("--temperature", value)
    for seed in (2**64, -(2**63) - 1, 10**23):
        assert f"seed={seed}: give a whole number from -9223372036854775808 to 18446744073709551615" in said(
            "--seed", seed
        )
    for seed in (2**64 - 1, -(2**63)):
        assert demo("caption", pictures[0], "--model", model, "--sample", "--seed", seed).status == 0


def test_a_telephones_folder_is_not_passed_over(demo: Demo, model: Path, pictures: list[Path]) -> None:
    heic = pictures[0].with_name("IMG_1.HEIC")
    heic.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    heif = shutil.copy(heic, heic.with_name("IMG_2.heif"))
    with Image.open(pictures[1]) as image:
        image.save(pictures[0].with_name("z.jfif"), "JPEG")
    done = demo("caption", pictures[0].parent, "--model", model)
    assert (done.status, len(done.out), len(done.err)) == (1, 7, 2)
    assert [bool(line) for line in done.out] == [False, False, True, True, True, True, True]
    for line, path in zip(done.err, (heic, heif), strict=True):
        assert line.startswith(f"caption: {path}: ")


def test_every_kind_of_image_works(demo: Demo, model: Path, odd_pictures: list[Path]) -> None:
    done = demo("caption", odd_pictures[0].parent, "--model", model)
    assert (done.status, done.err) == (0, [])
    assert len(done.out) == len(odd_pictures)
    assert all(done.out)
    first = demo("caption", odd_pictures[1], "--model", model).out
    assert first == demo("caption", odd_pictures[1].with_suffix(".gif"), "--model", model).out


def test_bad_images_among_good_ones(
    demo: Demo, model: Path, pictures: list[Path], bad_pictures: dict[str, Path]
) -> None:
    good = demo("caption", *pictures, "--model", model).out
    bad = list(bad_pictures.items())
    mixed = [pictures[0], bad[0][1], bad[1][1], pictures[1], bad[2][1], pictures[2], bad[3][1], bad[4][1], pictures[3]]
    done = demo("caption", *mixed, "--model", model)
    assert done.status == 1
    assert done.out == [good[0], "", "", good[1], "", good[2], "", "", good[3]]
    assert len(done.err) == len(bad)
    for line, (says, path) in zip(done.err, bad, strict=True):
        assert line.startswith(f"caption: {path}: ")
        assert says in line
    done = demo("caption", *mixed, "--model", model, "--json")
    found = [json.loads(line) for line in done.out]
    assert [f["image"] for f in found] == [str(path) for path in mixed]
    assert [f"caption: {f['error']}" for f in found if "error" in f] == done.err
    assert [f["caption"] for f in found if "error" not in f] == good
    assert done.status == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a.png", "--beams", "0"],
        ["a.png", "--beams", "x"],
        ["a.png", "--loud"],
        ["a.png", "--count", "0"],
        ["a.png", "--top-k", "5"],
    ],
)
def test_bad_arguments_exit_2(demo: Demo, arguments: list[str]) -> None:
    done = demo("caption", *arguments)
    assert (done.status, done.out) == (2, [])
    assert done.err[0].startswith("usage: ")


def refused(demo: Demo, *arguments: object, status: int = 1) -> str:
    """The one line on stderr with which the demo ends before it has captioned anything."""
    done = demo("caption", *arguments)
    assert (done.status, done.out, len(done.err)) == (status, [], 1), done
    line: str = done.err[0]
    assert line.startswith("caption: ")
    return line


def test_unusable_devices_and_folders(demo: Demo, model: Path, pictures: list[Path], tmp_path: Path) -> None:
    assert "device 'gpu'" in refused(demo, pictures[0], "--model", model, "--device", "gpu", status=2)
    (tmp_path / "hollow").mkdir()
    assert "no images in this folder" in refused(demo, tmp_path / "hollow", "--model", model)


def test_models_that_cannot_be_used(
    demo: Demo, checkpoint: Callable[..., Path], model: Path, pictures: list[Path], tmp_path: Path
) -> None:
    picture = pictures[0]
    assert "no such checkpoint folder" in refused(demo, picture, "--model", tmp_path / "none")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        broken = tmp_path / f"without {name}"
        shutil.copytree(model, broken)
        (broken / name).unlink()
        assert name in refused(demo, picture, "--model", broken)
        (broken / name).write_bytes((model / name).read_bytes()[:-20])
        assert name in refused(demo, picture, "--model", broken)
    pickle = tmp_path / "pickle"
    shutil.copytree(model, pickle)
    (pickle / "model.safetensors").write_bytes(b"\x80\x04\x95\x10\x00")
    assert "pickle" in refused(demo, picture, "--model", pickle)
    reader = checkpoint("vqa", ("yes", "no"), decoder="separate", decoder_reads="question", decoder_layers=2)
    assert "reads the question, not the image" in refused(demo, picture, "--model", reader)


def test_without_a_model_it_says_how_to_give_one(demo: Demo, pictures: list[Path], tmp_path: Path) -> None:
    demos = tmp_path / "demos"
    demos.mkdir()
    shutil.copy(ROOT / "demos/caption.py", demos)
    done = subprocess.run(
        [sys.executable, demos / "caption.py", pictures[0]], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"caption: {demos / 'model'} is not there; give a checkpoint folder with --model DIR.\n"


def test_a_request_to_stop_leaves_no_traceback(
    demo: Demo, model: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Predictor, "captions", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        done = demo("caption", *pictures, "--model", model)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.status, done.out, done.err) == (1, [], [])


def test_a_reader_that_has_enough_ends_it_quietly(model: Path, pictures: list[Path]) -> None:
    command = [sys.executable, ROOT / "demos/caption.py", *pictures * 20, "--model", model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().strip()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1
