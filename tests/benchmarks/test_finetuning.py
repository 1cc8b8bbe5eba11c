"""benchmarks/finetuning.py: the comparison scaled down and gone on with, the settings of every row, and the table of made numbers."""

import argparse
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.data.synthetic import write_scenes
from vlm.settings import load_config

SCRIPT = Path(__file__).parents[2] / "benchmarks/finetuning.py"


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """run(*arguments): the script's exit status."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def start(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return int(ended.value.code or 0)

    return start


def test_every_row_is_a_run_that_can_be_made(benchmark: dict[str, Any]) -> None:
    given = argparse.Namespace(methods=None, teacher="larger", seeds=2)
    rows = benchmark["rows"](given)
    assert [row[:2] for row in rows[:3]] == [
        ("everything", 0),
        ("everything", 1),
        ("image encoder at the full rate", 0),
    ]
    configs = [load_config(benchmark["CONFIG"], ["--model.text.dropout", "0.1", *settings]) for _, _, settings in rows]
    assert len({json.dumps(row[2]) for row in rows}) == len(rows) - 1, "each changes something else"
    assert configs[-1].finetune.teacher == "larger"
    given.teacher = None
    assert "a larger teacher" not in {name for name, *_ in benchmark["rows"](given)}


def test_the_table_of_made_numbers(benchmark: dict[str, Any]) -> None:
    run = {"steps": 100, "step_seconds": 1.5, "memory_gib": 2.25}
    results = {
        "the start itself": {"CIDEr": 40.0, "R@1": 30.0},
        "everything, seed 0": {"CIDEr": 50.0, "R@1": 10.0, **run},
        "everything, seed 1": {"CIDEr": 51.5, "R@1": 9.0, **run},
        "R-Drop": {"CIDEr": 52.0, "R@1": 9.5, **run},
    }
    lines = benchmark["table"](results).splitlines()
    assert lines[2] == "| the start itself | 40.0 | 30.0 |  |  |  |"
    assert lines[5] == "| R-Drop | 52.0 | 9.5 | 100 | 1.50 | 2.2 |"
    assert lines[-1] == "2 seeds of the baseline lie apart by: CIDEr 1.5, R@1 1.0"


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--seeds", "-1"], ["--methods", "magic"]])
def test_bad_arguments_exit_2(run: Callable[..., int], tmp_path: Path, arguments: list[str]) -> None:
    assert run("--out", str(tmp_path / "run"), *arguments) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_scaled_down_and_gone_on_with(
    run: Callable[..., int], checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "scenes", 16, 4, size=32)
    small = [
        "--set",
        "--data.batch-size",
        "4",
        "--data.workers",
        "0",
        "--data.streams",
        "4",
        "--model.image.image-size",
        "32",
    ]
    small += ["--data.max-tokens", "24", "--generation.max-length", "6", "--generation.beams", "1"]
    command = ["--start", str(checkpoint()), "--train", f"{tmp_path}/scenes/train", "--val", f"{tmp_path}/scenes/val"]
    command += ["--steps", "3", "--methods", "FreeLB", "--seeds", "1", "--out", str(tmp_path / "run"), *small]
    assert run(*command) == 0
    told = capfd.readouterr()
    names = [line.split(" | ")[0].removeprefix("| ") for line in told.out.splitlines() if line.startswith("| ")]
    assert names[2:] == ["the start itself", "everything, seed 0", "FreeLB"]
    assert told.out.count("| 3 |") == 2
    assert "=== 0 of 3 left, ETA" in told.err
    shutil.rmtree(tmp_path / "run/FreeLB")
    assert run(*command) == 0
    again = capfd.readouterr()
    assert again.err.count("$ vlm train") == 1, "the others are there"
    assert [line.split(" | ")[:3] for line in again.out.splitlines()] == [
        line.split(" | ")[:3] for line in told.out.splitlines()
    ]
    command[command.index("--steps") + 1] = "4"
    assert run(*command) == 1
    assert "was made with" in capfd.readouterr().err
