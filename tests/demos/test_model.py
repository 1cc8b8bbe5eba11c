"""The shipped checkpoint: small enough, complete, and at work in every demo without --model."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from vlm.checkpoint import read_answers, read_trained_on
from vlm.predictor import Predictor

Demo = Callable[..., Any]
ROOT = Path(__file__).parents[2]
MODEL, IMAGES = ROOT / "demos/model", ROOT / "demos/images"
PICTURES = sorted(IMAGES.glob("*.jpg"))


def test_it_is_small_and_in_half_precision() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40_000_000
    assert max(path.stat().st_size for path in files) <= 15 * 2**20
    weights = [path for path in files if path.name.startswith("model") and path.suffix == ".safetensors"]
    for path in weights:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
        assert kinds <= {"F16", "I64"}
    assert len(weights) > 1


def test_it_says_what_it_was_trained_on() -> None:
    trained_on = read_trained_on(MODEL)
    assert trained_on is not None
    assert len(trained_on) > 14_000
    assert len(read_answers(MODEL)) > 1000
    card = (MODEL / "README.md").read_text()
    assert all(word in card for word in ("Flickr8k", "DAQUAR", "gender", "research"))


def test_the_documents_give_this_checkpoints_numbers() -> None:
    """The stored temperature in the card and in docs/metrics.md, the card's calibration there, its DAQUAR score in that set's README."""
    card, metrics, daquar = (
        " ".join((ROOT / name).read_text().split())
        for name in ("demos/model/README.md", "docs/metrics.md", "datasets/daquar/README.md")
    )
    stored = json.loads((MODEL / "config.json").read_text())["calibration"]["temperature"]
    assert f"stores a temperature of {stored:.3f} " in card
    assert f"`demos/model`: T = {stored:.3f} from" in metrics
    measured = re.search(
        r"mean confidence is ([\d.]+) where accuracy is ([\d.]+) % \(ten human answers\), and ([\d.]+) where it is ([\d.]+) % \(yes/no\); "
        r"the expected calibration error falls from ([\d.]+) to ([\d.]+) points and from ([\d.]+) to ([\d.]+)\. .*"
        r"an error of ([\d.]+) points \(([\d.]+) without",
        card,
    )
    assert measured
    ten, right, coin, chance, ten_before, ten_after, coin_before, coin_after, daquar_after, daquar_before = (
        measured.groups()
    )
    assert f"mean confidence is {ten} and {coin} where its accuracies are {right} and {chance} % (ten" in metrics
    assert f"calibration error {ten_after} and {coin_after} instead of {ten_before} and {coin_before}." in metrics
    assert f"on DAQUAR that one makes it worse ({daquar_after} instead of {daquar_before})" in metrics
    scored = re.search(r"\| DAQUAR \(1,267\) \| ([\d.]+) %", card)
    assert scored
    assert f"`demos/model` reaches {scored[1]} %" in daquar


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.load(MODEL, "cpu")


def test_captions_of_free_photographs(predictor: Predictor) -> None:
    captions = [said.text for said in predictor.caption(PICTURES)]
    assert len(set(captions)) >= 0.8 * len(PICTURES)
    for caption in captions:
        words = caption.split()
        assert 4 <= len(words) <= 25
        assert all(one != other for one, other in pairwise(words)), caption
    said = dict(zip((path.stem for path in PICTURES), captions, strict=True))
    assert "cat" in said["cat"].split()
    assert {"woman", "man", "person", "girl", "boy"} & set(said["astronaut"].split())


def test_answers_and_embeddings(predictor: Predictor) -> None:
    answer = predictor.answer(IMAGES / "cat.jpg", "Is this a cat?")
    assert answer.text in ("yes", "no")
    assert 0 < answer.confidence <= 1
    texts = ["a cat looks at the camera", "a rocket takes off", "a cup of coffee on a table"]
    images = predictor.embed_images([IMAGES / name for name in ("cat.jpg", "rocket.jpg", "coffee.jpg")])
    best = (predictor.embed_texts(texts) @ images.T).argmax(1)
    assert best[0] == 0
    assert torch.isfinite(images).all()


def test_every_demo_works_without_a_model_given(demo: Demo, tmp_path: Path) -> None:
    done = demo("caption", IMAGES / "cat.jpg", "--json")
    assert done.status == 0
    assert json.loads(done.out[0])["caption"]
    assert demo("vqa", IMAGES / "cat.jpg", "Is this a cat?").out[0]
    found = demo("retrieve", IMAGES, "a cat", "--top", 1, "--no-cache")
    assert (found.status, len(found.out)) == (0, 1)
    assert demo("contact_sheet", "--out", tmp_path / "sheet.png").status == 0
    assert (tmp_path / "sheet.png").stat().st_size > 100_000
