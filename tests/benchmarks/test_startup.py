"""benchmarks/startup.py: medians of what it measured, and a clear end where a command fails."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, **result: Any) -> tuple[int, list[list[str]]]:
    """Exit status and the commands that were started, each of which ends at once with `result`."""
    started: list[list[str]] = []

    def start(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, **({"returncode": 0, "stdout": "a dog\n", "stderr": ""} | result))

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr(sys, "argv", ["benchmarks/startup.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks/startup.py"), run_name="__main__")
    return int(ended.value.code or 0), started


def test_both_are_started_in_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, started = run(monkeypatch, "--model", "m", "--image", "i.jpg", "--runs", "2")
    assert status == 0
    assert [command[1:] for command in started] == [
        ["-c", "import torch, timm"],
        [str(ROOT / "demos/caption.py"), "i.jpg", "--model", "m"],
    ] * 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" median ")[0].strip() for line in lines[:2]] == ["import torch, timm", "demos/caption.py"]
    assert all("2 runs" in line for line in lines[:2])
    assert lines[2].startswith("difference ")


def test_a_command_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = run(monkeypatch, "--model", "m", "--image", "i.jpg", returncode=1, stderr="caption: m is not there\n")
    assert status == 1
    assert capsys.readouterr().err == "startup: import torch, timm ended with status 1: caption: m is not there\n"


def test_bad_arguments_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--model", "m", "--image", "i.jpg", "--runs", "0") == (2, [])
    assert run(monkeypatch, "--model", "m") == (2, [])
