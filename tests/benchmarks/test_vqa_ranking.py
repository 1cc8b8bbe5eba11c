"""benchmarks/vqa_ranking.py: the three ways agree where they must, and what is asked for in vain is said."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.data.synthetic import write_scenes

SCRIPT = Path(__file__).parents[2] / "benchmarks/vqa_ranking.py"
ANSWERS = ("yes", "no", "three", "red circle", "red square", "blue")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 4, 4)
    return folder / "val"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


def test_all_ways_agree_on_a_list_that_pruning_leaves_whole(
    checkpoint: Callable[..., Path], scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint("vqa", ANSWERS)
    assert run(monkeypatch, "--model", model, "--shards", scenes, "--answers", 6, "--questions", 3, "--runs", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("k = 1: the same answers in the same order for 3 of 3 questions")
    assert lines[1].startswith("k = 5: the same answers in the same order for 3 of 3 questions")
    assert lines[2] == "pruned to 128: the same winner for 3 of 3"
    assert [line.split(" | ")[0] for line in lines[6:]] == [
        "| best-first, k = 1",
        "| best-first, k = 5",
        "| pruned to 128",
        "| all",
    ]
    assert lines[-1].count("(1.0 x)") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--answers", 7], "list of 6 answers"), (["--questions", 999, "--answers", 6], "questions")],
)
def test_what_there_is_too_little_of(
    checkpoint: Callable[..., Path],
    scenes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    message: str,
) -> None:
    assert run(monkeypatch, "--model", checkpoint("vqa", ANSWERS), "--shards", scenes, *arguments) == 1
    assert message in capsys.readouterr().err
