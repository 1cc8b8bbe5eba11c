"""benchmarks/cpu_training.py: every variant is measured and compared."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/cpu_training.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


def test_each_variant_is_compared_with_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seconds = {"as it is": 4.0, "folded": 3.0, "kept memory": 3.2, "both": 2.0, "both, fp32": 8.0}[command[-1]]
        found = json.dumps({"seconds": seconds, "faults": 1000.0, "gib": 1.5})
        return subprocess.CompletedProcess(command, 0, stdout=found)

    monkeypatch.setattr(subprocess, "run", start)
    assert run(monkeypatch, "--runs", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12].strip() for line in lines] == ["as it is", "folded", "kept memory", "both", "both, fp32"]
    assert lines[3].endswith("2.00 s a step (2.00 x), 1,000 page faults a step, 1.5 GiB at most")


def test_a_variant_is_measured() -> None:
    measure = runpy.run_path(str(SCRIPT))["measure"]
    found = measure("test_resnet", batch=1, texts=2, fold=True, keep=False, precision="fp32")
    assert found.keys() == {"seconds", "faults", "gib"}
    assert found["seconds"] > 0


def test_bad_arguments_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--runs", "0") == 2
    assert run(monkeypatch, "--variant", "other") == 2
