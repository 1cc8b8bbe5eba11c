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
        seconds = {"as it is": 4.0, "both": 2.0}.get(command[-1], 3.0)
        found = json.dumps({"seconds": seconds, "faults": 1000.0, "gib": 1.5})
        return subprocess.CompletedProcess(command, 0, stdout=found)

    monkeypatch.setattr(subprocess, "run", start)
    assert run(monkeypatch, "--runs", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:13].strip() for line in lines] == list(runpy.run_path(str(SCRIPT))["VARIANTS"])
    assert lines[3].endswith("2.00 s a step (2.00 x), 1,000 page faults a step, 1.5 GiB at most")
    assert run(monkeypatch, "--variants", "both", "as it is") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:13].strip() for line in lines] == ["both", "as it is"]
    assert "4.00 s a step (0.50 x)" in lines[1]


@pytest.mark.parametrize("name", ["folded", "stored, fp32"])
def test_a_variant_is_measured(name: str) -> None:
    script = runpy.run_path(str(SCRIPT))
    found = script["measure"]("test_resnet", batch=1, texts=2, variant=script["VARIANTS"][name]._replace(keep=False))
    assert found.keys() == {"seconds", "faults", "gib"}
    assert found["seconds"] > 0


def test_bad_arguments_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--runs", "0") == 2
    assert run(monkeypatch, "--variant", "other") == 2
