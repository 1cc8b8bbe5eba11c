"""demos/quickstart.py: the whole way, scaled down; the full size is what `make demo` runs."""

import itertools
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlm.errors import UserError

ROOT = Path(__file__).parents[2]
Demo = Callable[..., Any]


def table(lines: list[str]) -> dict[str, float]:
    """The printed scores by name."""
    start = next(i for i, line in enumerate(lines) if re.match(r"On \d+ held-out scenes and \d+ questions:", line))
    rows = [re.fullmatch(r"  (.*\S) +(-?[\d.]+)", line) for line in lines[start + 1 : start + 7]]
    assert all(rows), lines[start:]
    return {row[1].strip(): float(row[2]) for row in rows if row}


def said(lines: list[str], of: str) -> list[str]:
    """The lines that demos/caption.py printed for these arguments."""
    rest = lines[lines.index(f"$ python demos/caption.py {of}") + 1 :]
    return list(itertools.takewhile(lambda line: line and not line.startswith("$ "), rest))


def check_outcome(out: Path, lines: list[str]) -> dict[str, float]:
    """The end names the run folder and the pictures, which open; one caption for each image, of scenes and of photographs; the table."""
    pictures = rf"{out}/quickstart\.png and {out}/photographs\.png"
    assert re.fullmatch(
        rf"Done in \d+ s\. The run is in {out}; curves, captions and answers are in {pictures}", lines[-1]
    )
    for name in ("quickstart.png", "photographs.png"):
        with Image.open(out / name) as image:
            image.load()
            assert image.format == "PNG"
    images = sorted((out / "images").iterdir())
    assert len(said(lines, f"{out}/images --model {out}/captioning/latest")) == len(images)
    assert len(said(lines, str(ROOT / "demos/images"))) == len(list((ROOT / "demos/images").glob("*.jpg")))
    for name in ("pretrain", "captioning", "vqa", "vqa_question_only"):
        assert (out / name / "latest/model.safetensors").exists()
    scores = table(lines)
    assert list(scores) == [
        "captions: exact match, %",
        "captions: CIDEr",
        "VQA accuracy, %",
        "question only (the same training, grey images), %",
        "commonest answer to the question's first words, %",
        "commonest answer, %",
    ]
    return scores


def test_the_whole_way_scaled_down(demo: Demo, tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    folder = os.getcwd()
    done = demo("quickstart", "--out", tmp_path / "run", "--train", 64, "--val", 6, "--epochs", 1)
    assert done.status == 0
    titles = [line for line in done.out if line.startswith("=== ")]
    assert [title.split(".")[0] for title in titles] == [f"=== {number}" for number in range(1, 9)]
    scores = check_outcome(tmp_path / "run", done.out)
    assert all(0 <= value <= 100 for name, value in scores.items() if name.endswith("%"))
    assert sum(" samples/s | " in line and " | data wait " in line for line in done.err) >= 4, (
        "each training says how fast it is"
    )
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert os.getcwd() == folder
    assert not torch.are_deterministic_algorithms_enabled()


def test_too_few_scenes_are_said_in_one_line(demo: Demo, tmp_path: Path) -> None:
    done = demo("quickstart", "--out", tmp_path / "run", "--train", 10, "--val", 2)
    assert done.status == 1
    assert done.err[-1] == "quickstart: `vlm train` ended with status 1; see above."
    assert re.search(r"10 samples, expected batch_size=\d+; use a smaller batch", done.err[-2])


@pytest.mark.parametrize("arguments", [["--train", "0"], ["--val", "-1"], ["--epochs", "many"], ["more"]])
def test_bad_arguments_exit_2(demo: Demo, tmp_path: Path, arguments: list[str]) -> None:
    done = demo("quickstart", "--out", tmp_path / "run", *arguments)
    assert (done.status, done.out) == (2, [])
    assert not (tmp_path / "run").exists()


def test_it_removes_only_what_it_made(demo: Demo, tmp_path: Path) -> None:
    make_anew = runpy.run_path(str(ROOT / "demos/quickstart.py"))["make_anew"]
    run = tmp_path / "deep/run"
    make_anew(run)
    (run / "old").touch()
    make_anew(run)
    assert not (run / "old").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    (tmp_path / "file").touch()
    for theirs in (tmp_path / "mine", tmp_path / "file", tmp_path):
        done = demo("quickstart", "--out", theirs)
        assert (done.status, done.out) == (1, [])
        assert "is not a run of the quickstart" in done.err[0]
        assert len(done.err) == 1
    assert (tmp_path / "mine/thesis.tex").exists()
    with pytest.raises(UserError, match="cannot be made anew"):
        make_anew(tmp_path / "file/run")


@pytest.mark.slow
def test_the_whole_way_in_full_size(tmp_path: Path) -> None:
    """What `make demo` runs: good captions and answers on held-out scenes, far above what questions alone give away."""
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "demos/quickstart.py"), "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    scores = check_outcome(out, done.stdout.splitlines())
    assert scores["captions: exact match, %"] > 40
    baselines = [value for name, value in scores.items() if name.startswith(("question only", "commonest"))]
    assert scores["VQA accuracy, %"] > max(baselines) + 20
