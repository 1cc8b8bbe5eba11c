"""benchmarks/few_rows.py runs, and compares the two ways at as many rows as it was asked for."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/few_rows.py"


def test_a_row_for_each_number_of_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--rows", "1", "3", "--threads", "1", "--runs", "1"])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in lines] == ["rows", "---", "1", "3"]
    assert all(float(line.split("|")[5].removesuffix("x ").strip()) > 0 for line in lines[2:])
