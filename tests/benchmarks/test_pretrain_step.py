"""benchmarks/pretrain_step.py: both steps have the same losses, ours has less to do, and nothing is timed where they differ."""

import importlib
import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPT = FOLDER / "pretrain_step.py"


@pytest.fixture
def step_pair() -> ModuleType:
    return importlib.import_module("step_pair")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize(("step", "words"), [("albef", "masked_language"), ("blip", "captioning")])
def test_both_steps_have_the_same_losses(step_pair: ModuleType, step: str, words: str) -> None:
    found = step_pair.compare(step, 4, 30, torch.device("cpu"), tiny=True, dtype=torch.float64)
    assert [set(losses) for losses in found.losses] == [{"contrastive", "matching", words}] * 2
    assert found.difference < 1e-12
    ours, reference = found.flops
    assert (
        0 < ours < 0.9 * reference
    )  # image tokens projected once, logits where a word is hidden, texts as long as they are


def test_padding_is_not_seen(step_pair: ModuleType) -> None:
    config = step_pair.settings("albef", tiny=True, dropout=False)
    reference, batch = step_pair.reference_step(config).double(), step_pair.draw_batch(config, 4)
    reference.average = reference.enqueue = lambda *_: None  # the same teacher and queue twice
    negatives = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1])
    images = batch.images / 127.5 - 1.0
    short, long = (
        reference(replace(step_pair.as_published(batch, images.double(), pad), negatives=negatives)) for pad in (0, 30)
    )
    assert {k: v.item() for k, v in long.items()} == pytest.approx({k: v.item() for k, v in short.items()}, rel=1e-12)


def test_captions_are_as_long_as_stated(step_pair: ModuleType) -> None:
    batch = step_pair.draw_batch(step_pair.settings("albef", tiny=True), 512)
    lengths = batch.texts.mask.sum(1)
    assert int(lengths.min()) >= 8
    assert 20 <= int(lengths.max()) <= 25
    assert float(lengths.float().mean()) == pytest.approx(13.0, abs=0.5)
    assert batch.texts.ids.shape[1] == -(-int(lengths.max()) // 8) * 8
    words = (lengths - 2).sum()
    assert len(batch.masked.positions) / float(words) == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize("part", ["ours", "reference"])
@pytest.mark.parametrize("step", ["albef", "blip"])
def test_a_side_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str, part: str
) -> None:
    monkeypatch.setattr("vlm.memory.keep_freed_memory", lambda: True)  # it lasts as long as the process
    arguments = ("--step", step, "--device", "cpu", "--batch", "2", "--steps", "1", "--tiny", "--part", part)
    assert run(monkeypatch, *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"seconds", "cpu_seconds", "gib", "matmul_tflops"}
    assert min(found.values()) > 0


def answers(monkeypatch: pytest.MonkeyPatch, difference: float) -> list[str]:
    """The parts that were started, each of which ends at once."""
    started: list[str] = []

    def start(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(command[-1])
        losses = [{"contrastive": [2.0, 2.0 + difference]}]
        found: dict[str, Any] = {"losses": losses, "flops": [2e11, 3e11], "difference": difference}
        if command[-1] != "compare":
            seconds = {"ours": 2.0, "reference": 3.0}[command[-1]]
            found = {"seconds": seconds, "cpu_seconds": seconds, "gib": 4.0, "matmul_tflops": 1.0}
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(found))

    monkeypatch.setattr(subprocess, "run", start)
    return started


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started = answers(monkeypatch, 1e-6)
    assert run(monkeypatch, "--device", "cpu", "--runs", "2", "--batch", "4") == 0
    assert started == ["compare", "ours", "reference", "ours", "reference"]
    printed = capsys.readouterr()
    assert "step 1 contrastive      ours 2.000000 reference 2.000001" in printed.err
    lines = printed.out.splitlines()
    assert " ".join(lines[1].split()) == "ours 2.00 pairs/s 2.000 s a step 4.0 GiB 200 GFLOP a pair 0.40 TFLOP/s"
    assert lines[3] == "ours is 1.50 x as fast, with 0.67 x the operations"
    assert run(monkeypatch, "--device", "cpu", "--runs", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["speedup"] == 1.5


@pytest.mark.parametrize("difference", [0.1, float("nan")])
def test_nothing_is_timed_where_losses_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], difference: float
) -> None:
    started = answers(monkeypatch, difference)
    assert run(monkeypatch, "--device", "cpu") == 1
    assert started == ["compare"]
    assert "nothing is timed" in capsys.readouterr().err


def test_bad_arguments_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--batch", "1") == 2
    assert run(monkeypatch, "--step", "clip") == 2
