"""demos/retrieve.py: the images that fit best, the best first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.predictor import Predictor

Demo = Callable[..., Any]


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("pretraining")


def test_the_order_is_that_of_the_similarities(demo: Demo, model: Path, pictures: list[Path]) -> None:
    predictor = Predictor.load(model, "cpu")
    similarity = (predictor.embed_images(pictures) @ predictor.embed_texts(["two dogs"])[0]).tolist()
    expected = sorted(zip(similarity, map(str, pictures), strict=True), reverse=True)
    done = demo("retrieve", "two dogs", pictures[0].parent, "--model", model)
    assert (done.status, done.err) == (0, [])
    assert done.out == [f"{value:.3f}\t{path}" for value, path in expected]
    done = demo("retrieve", "two dogs", *pictures, "--model", model, "--top", "2", "--json", "--device", "cpu")
    found = [json.loads(line) for line in done.out]
    assert [line["image"] for line in found] == [path for _, path in expected[:2]]
    assert [line["similarity"] for line in found] == pytest.approx([value for value, _ in expected[:2]], abs=1e-4)


def test_bad_images_are_named_and_the_others_listed(
    demo: Demo, model: Path, pictures: list[Path], bad_pictures: dict[str, Path]
) -> None:
    done = demo("retrieve", "two dogs", *bad_pictures.values(), pictures[0], "--model", model)
    assert (done.status, len(done.out), len(done.err)) == (1, 1, len(bad_pictures))
    for line, (says, path) in zip(done.err, bad_pictures.items(), strict=True):
        assert line.startswith("retrieve: ")
        assert str(path) in line
        assert says in line


@pytest.mark.parametrize("arguments", [[], ["dogs"], [" ", "a.png"], ["dogs", "a.png", "--top", "0"]])
def test_bad_arguments_exit_2(demo: Demo, arguments: list[str]) -> None:
    done = demo("retrieve", *arguments)
    assert (done.status, done.out) == (2, [])


def test_a_model_that_is_not_there(demo: Demo, pictures: list[Path], tmp_path: Path) -> None:
    done = demo("retrieve", "dogs", pictures[0], "--model", tmp_path / "none")
    assert (done.status, done.out, len(done.err)) == (1, [], 1)
    assert "no such checkpoint folder" in done.err[0]
