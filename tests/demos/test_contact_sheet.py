"""demos/contact_sheet.py: a picture of every image of a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Demo = Callable[..., Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("vqa", ("yes", "no"))


def test_images_with_and_without_questions(demo: Demo, model: Path, pictures: list[Path], tmp_path: Path) -> None:
    questions = {"a.png": [{"question": "Is it red?", "answer": "yes"}]}
    (pictures[0].parent / "questions.json").write_text(json.dumps(questions))
    out = tmp_path / "sheet.png"
    done = demo("contact_sheet", pictures[0].parent, "--model", model, "--out", out)
    assert (done.status, done.out, done.err) == (0, [str(out)], [])
    assert Image.open(out).width > 800


@pytest.mark.parametrize("text", ["{", "[]", '{"a.png": [{"question": "What?"}]}', '{"a.png": [3]}'])
def test_damaged_questions_are_one_line(
    demo: Demo, model: Path, pictures: list[Path], tmp_path: Path, text: str
) -> None:
    (pictures[0].parent / "questions.json").write_text(text)
    done = demo("contact_sheet", pictures[0].parent, "--model", model, "--out", tmp_path / "sheet.png")
    assert (done.status, done.out, len(done.err)) == (1, [], 1)
    assert "questions.json: expected" in done.err[0]


def test_every_shipped_photograph_is_credited_and_asked_about() -> None:
    folder = ROOT / "demos/images"
    names = {path.name for path in folder.glob("*.jpg")}
    assert 8 <= len(names) <= 12
    assert set(json.loads((folder / "questions.json").read_text())) == names
    credits = (folder / "README.md").read_text()
    assert all(f"`{name}`" in credits for name in names)
