"""benchmarks/captioning.py: equal captions first, then figures of both sides for each setting."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/captioning.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", "--device", "cpu", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


def test_both_sides_say_the_same_and_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--batches", 2, 9, "--max-images", 2, "--runs", 1, "--tokens", 6, "--beams", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("beams 3, fp64: 4 of 4 captions are equal, ")
    rows = [line.split(" | ")[:2] for line in lines if line.startswith("| 3, 2 ")]
    assert rows == [["| 3, 2", "ours"], ["| 3, 2", "transformers"], ["| 3, 2", "ratio"]]
    assert "2 of 2" in next(line for line in lines if "| ours |" in line)
    assert lines[-1].startswith("Peak of memory with 3 beams and 2 images: ours ")
    assert not any(line.startswith("| 3, 9") for line in lines), "--max-images leaves larger batches out"


def test_nothing_is_timed_where_captions_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.model import beam_search

    def wrong(*arguments: object) -> object:
        return [type("Text", (), {"ids": [1]}) for _ in range(len(arguments[2]))]  # type: ignore[arg-type]

    monkeypatch.setattr(beam_search, "beam_search", wrong)
    assert run(monkeypatch, "--batches", 1, "--runs", 1, "--tokens", 6, "--beams", 3) == 1
    captured = capsys.readouterr()
    assert "0 of 4 captions are equal" in captured.out
    assert "nothing is timed" in captured.err
    assert "|" not in captured.out


@pytest.mark.parametrize("arguments", [["--runs", 0], ["--batches", 4, 0], ["--precision", "fp16"]])
def test_bad_arguments_exit_2(monkeypatch: pytest.MonkeyPatch, arguments: list[object]) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert torch.get_default_dtype() == torch.float32
