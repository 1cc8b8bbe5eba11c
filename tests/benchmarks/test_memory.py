"""benchmarks/memory.py: every row is measured and compared with the plain one."""

import json
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/memory.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


def test_the_table_is_relative_to_the_plain_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        peak = {"plain": 3.0, "micro-batches": 1.5}.get(command[-1], 2.0)
        found = json.dumps({"peak": peak, "rest": 1.0, "seconds": 2 * peak, "processor_seconds": peak})
        return subprocess.CompletedProcess(command, 0, stdout=f"one step: loss 1.2\n{found}\n")

    monkeypatch.setattr(subprocess, "run", start)
    assert run(monkeypatch, "--batch", "32", "--accumulate", "8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[2] == "| plain | 3.00 GiB | 2.00 GiB (1.00 x) | 6.00 (1.00 x) | 3.00 (1.00 x) |"
    assert lines[6] == "| 8 micro-batches of 4 | 1.50 GiB | 0.50 GiB (0.25 x) | 3.00 (0.50 x) | 1.50 (0.50 x) |"


def test_a_row_is_measured() -> None:
    measure = runpy.run_path(str(SCRIPT))["measure"]
    given = Namespace(batch=4, accumulate=2, image_encoder="test_vit", image_size=32, dim=16, layers=2, steps=1)
    found = measure(Namespace(**vars(given), device="cpu", precision="fp32"), True, True, True)
    assert found["peak"] >= found["rest"] > 0
    assert found["seconds"] > 0


def test_bad_arguments_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--accumulate", "0") == 2
    assert run(monkeypatch, "--batch", "10", "--accumulate", "4") == 2
    assert run(monkeypatch, "--row", "other") == 2
