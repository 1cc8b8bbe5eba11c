"""demos/vqa.py: the answer on stdout and nothing else."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.predictor import Predictor

ROOT = Path(__file__).parents[2]
ANSWERS = ("yes", "no", "three", "brown horse")
Demo = Callable[..., Any]


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("vqa", ANSWERS)


def test_the_answer_is_the_predictor_s(demo: Demo, model: Path, pictures: list[Path]) -> None:
    expected = Predictor.load(model, "cpu").answer(pictures[0], "How many dogs?")
    done = demo("vqa", pictures[0], "How many dogs?", "--model", model)
    assert (done.status, done.out, done.err) == (0, [expected.text], [])
    done = demo("vqa", pictures[0], "How many dogs?", "--model", model, "--json", "--device", "cpu")
    found = json.loads(done.out[0])
    assert found.pop("confidence") == pytest.approx(expected.confidence, abs=1e-4)
    assert found == {"image": str(pictures[0]), "question": "How many dogs?", "answer": expected.text}


def test_open_answers_and_the_form_that_reads_the_question(
    demo: Demo, checkpoint: Callable[..., Path], pictures: list[Path]
) -> None:
    reader = {"decoder": "separate", "decoder_reads": "question", "decoder_layers": 2}
    for folder in (checkpoint("vqa"), checkpoint("vqa", ANSWERS, **reader)):
        done = demo("vqa", pictures[0], "How many dogs?", "--model", folder, "--json")
        assert done.status == 0
        assert 0 <= json.loads(done.out[0])["confidence"] <= 1


def test_every_kind_of_image_works(demo: Demo, model: Path, odd_pictures: list[Path]) -> None:
    for path in odd_pictures:
        done = demo("vqa", path, "How many dogs?", "--model", model)
        assert (done.status, done.err) == (0, []), path.name
        assert done.out[0] in ANSWERS


def test_bad_images(demo: Demo, model: Path, bad_pictures: dict[str, Path]) -> None:
    for says, path in bad_pictures.items():
        done = demo("vqa", path, "How many dogs?", "--model", model)
        assert (done.status, done.out, len(done.err)) == (1, [], 1)
        assert says in done.err[0]
        done = demo("vqa", path, "How many dogs?", "--model", model, "--json")
        assert json.loads(done.out[0]) == {"image": str(path), "error": done.err[0].removeprefix("vqa: ")}


@pytest.mark.parametrize("arguments", [[], ["a.png"], ["a.png", " "], ["a.png", "what?", "more"]])
def test_bad_arguments_exit_2(demo: Demo, arguments: list[str]) -> None:
    done = demo("vqa", *arguments)
    assert (done.status, done.out) == (2, [])


def test_models_that_cannot_be_used(
    demo: Demo, checkpoint: Callable[..., Path], model: Path, pictures: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "answers.json").write_text("{")
    for folder, says in (
        (tmp_path / "none", "no such checkpoint folder"),
        (checkpoint(), "trained for captioning and answers no questions"),
        (broken, "answers.json: not a list of answers"),
    ):
        done = demo("vqa", pictures[0], "How many dogs?", "--model", folder, "--json")
        assert (done.status, done.out, len(done.err)) == (1, [], 1)
        assert says in done.err[0]


def test_without_a_model_it_says_how_to_give_one(pictures: list[Path], tmp_path: Path) -> None:
    demos = tmp_path / "demos"
    demos.mkdir()
    for name in ("vqa.py", "caption.py"):
        shutil.copy(ROOT / "demos" / name, demos)
    done = subprocess.run(
        [sys.executable, demos / "vqa.py", pictures[0], "What?"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"vqa: {demos / 'model'} is not there; give a checkpoint folder with --model DIR.\n"
