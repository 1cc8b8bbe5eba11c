"""demos/contact_sheet.py: a picture of every image of a folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
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


def test_a_folder_for_the_picture_is_made(demo: Demo, model: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "deep/er/sheet.png"
    done = demo("contact_sheet", pictures[0].parent, "--model", model, "--out", out)
    assert (done.status, done.out, out.exists()) == (0, [str(out)], True)


@pytest.mark.parametrize(
    ("name", "said", "mend"),
    [
        ("sheet.foo", "the picture cannot be written", "give --out NAME.png"),
        ("pictures/a.png/sheet.png", "cannot be written", "choose another folder"),
    ],
)
def test_a_picture_that_cannot_be_written_is_one_line(
    demo: Demo, model: Path, pictures: list[Path], tmp_path: Path, name: str, said: str, mend: str
) -> None:
    for done in (
        demo("contact_sheet", pictures[0].parent, "--model", model, "--out", tmp_path / name),
        demo("retrieve", *pictures, "dogs", "--model", model, "--no-cache", "--out", tmp_path / name),
    ):
        assert (done.status, len(done.err)) == (1, 1)
        assert f"{tmp_path / name}: {said} (" in done.err[0]
        assert mend in done.err[0]


def test_names_and_words_are_drawn_as_they_are(
    demo: Demo, model: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A formula's signs, and a name in Latin-1, whose é arrives as half a character."""
    drawn: list[str] = []
    set_title = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda *a, **k: drawn.append(a[1]) or set_title(*a, **k))
    folder = pictures[0].parent
    for path, name in zip(pictures[:2], (b"a$b_{$.png", b"caf\xe9.png"), strict=True):
        path.rename(os.fsdecode(os.path.join(os.fsencode(folder), name)))
    questions = {"a$b_{$.png": [{"question": "Is it $b_{$?", "answer": "yes"}]}
    (folder / "questions.json").write_text(json.dumps(questions))
    assert demo("contact_sheet", folder, "--model", model, "--out", tmp_path / "sheet.png").status == 0
    drawn.clear()
    done = demo("retrieve", folder, "dogs", "--model", model, "--no-cache", "--json", "--out", tmp_path / "best.png")
    assert (done.status, len(drawn)) == (0, 4)
    assert {title.split()[1] for title in drawn} == {"a$b_{$.png", "caf?.png", "c.png", "d.png"}


def test_every_shipped_photograph_is_credited_and_asked_about() -> None:
    folder = ROOT / "demos/images"
    names = {path.name for path in folder.glob("*.jpg")}
    assert 8 <= len(names) <= 12
    assert set(json.loads((folder / "questions.json").read_text())) == names
    credits = (folder / "README.md").read_text()
    assert all(f"`{name}`" in credits for name in names)
