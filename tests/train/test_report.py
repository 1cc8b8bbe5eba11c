"""Log lines survive a kill and a resumption; times and numbers are what a person would compute."""

import json
from pathlib import Path

import pytest
import torch

from vlm.data.batch import Batch
from vlm.errors import UserError
from vlm.objectives.objective import Loss
from vlm.train.distributed import Ranks
from vlm.train.meter import Meter
from vlm.train.report import Clock, JsonLines, duration, number, read_json_lines, say


def test_lines_are_read_back(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "deep" / "log.jsonl")
    log.write(kind="train", step=1, loss=0.5)
    log.write(kind="train", step=2, loss=0.25)
    assert read_json_lines(log.path) == [{"kind": "train", "step": s, "loss": 0.5 / s} for s in (1, 2)]
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_resuming_drops_what_will_be_done_again_and_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [{"kind": "train", "step": s} for s in (10, 20, 30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st')
    assert read_json_lines(path) == lines
    log = JsonLines(path, last_step=20)
    assert read_json_lines(path) == lines[:2]
    log.write(kind="train", step=21)
    assert [line["step"] for line in read_json_lines(path)] == [10, 20, 21]
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_new_run_begins_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    assert read_json_lines(JsonLines(tmp_path / "log.jsonl").path) == []


def test_a_log_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="cannot be written"):
        JsonLines(tmp_path / "a.txt" / "log.jsonl")
    log = JsonLines.__new__(JsonLines)
    log.path = tmp_path  # a folder cannot be appended to
    with pytest.raises(UserError, match="cannot be written"):
        log.write(step=1)


@pytest.mark.parametrize(
    ("seconds", "want"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (93784, "26:03:04"),
        (-5, "0:00"),
    ],
)
def test_durations(seconds: float, want: str) -> None:
    assert duration(seconds) == want


@pytest.mark.parametrize(
    ("value", "want"),
    [(0, "0"), (0.0123456, "0.01235"), (123.456, "123.5"), (0.0000123, "1.2e-05"), (2, "2"), (-0.5, "-0.5")],
)
def test_numbers(value: float, want: str) -> None:
    assert number(value) == want


def test_only_the_first_rank_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    say("alone")
    monkeypatch.setenv("RANK", "0")
    say("first")
    monkeypatch.setenv("RANK", "1")
    say("second")
    assert capsys.readouterr().err == "alone\nfirst\n"


class Time:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("vlm.train.report.time.perf_counter", lambda: self.now)


def test_rates_waiting_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    clock = Clock(total_steps=100, done=10, skip=2)
    for took, waited in [(30.0, 20.0), (10.0, 0.0)]:  # two slow first steps
        time.now += took
        clock.step(8, waited)
    assert clock.interval() == pytest.approx({"samples_per_second": 16 / 40, "data_wait": 0.5})  # no estimate yet
    for _ in range(4):
        time.now += 2.0
        clock.step(8, 0.5)
    time.now += 1000  # an evaluation is not a step
    clock.restart()
    time.now += 4.0
    clock.step(8, 0.5)
    # five steps since, in 12 s; 83 steps left at the mean of 12 / 5 s
    assert clock.interval() == pytest.approx(
        {"samples_per_second": 40 / 12, "data_wait": 2.5 / 12, "eta_seconds": 83 * 2.4}
    )
    time.now += 2.0
    clock.step(8, 0.0)
    assert clock.interval() == pytest.approx({"samples_per_second": 4.0, "data_wait": 0.0, "eta_seconds": 82 * 14 / 6})


YES = torch.tensor(True)


def test_the_meter_divides_sums_by_counts_and_begins_anew() -> None:
    meter, alone = Meter({"a": 1.0, "b": 0.5}), Ranks(0, 1, torch.device("cpu"))

    def loss(total: float, count: float) -> Loss:
        return Loss(torch.tensor(total), torch.tensor(count), {"accuracy": (torch.tensor(1), torch.tensor(2))})

    batch = Batch.fake()
    for causes in ({"no text": 2}, {"no text": 1, "not an image": 3}):
        batch.filled.clear()
        batch.filled.update(causes)
        meter.add({"a": loss(6.0, 2.0), "b": loss(2.0, 4.0)}, batch)
    meter.settle(YES, torch.tensor(2.0))
    meter.add({"a": loss(0.0, 6.0), "b": loss(0.0, 0.0)}, Batch.fake())
    assert meter.finite()
    meter.settle(YES, torch.tensor(5.0))
    assert meter.take(alone) == pytest.approx(
        {
            "a/loss": 12 / 10,
            "b/loss": 4 / 8,
            "loss": 12 / 10 + 0.5 * 4 / 8,
            "a/accuracy": 0.5,
            "b/accuracy": 0.5,
            "gradient_norm": 3.5,
            "filled": 6,
            "filled/no text": 3,
            "filled/not an image": 3,
        }
    )
    meter.add({"a": loss(1.0, 1.0), "b": loss(0.0, 0.0)}, Batch.fake())
    meter.settle(YES, torch.tensor(1.0))
    values = meter.take(alone)
    assert (values["a/loss"], values["b/loss"], values["filled"]) == (1.0, 0.0, 0)
    # a skipped step does not count, and where all were skipped there is nothing to tell
    for total, norm in ((float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))):
        meter.add({"a": loss(1.0, 2.0), "b": loss(total, 1.0)}, Batch.fake())
        assert bool(meter.finite()) == (total == 1.0)
        meter.settle(~YES, torch.tensor(norm))
    state = meter.state()
    assert meter.take(alone) == {}
    meter.load_state(state, torch.device("cpu"))
    meter.add({"a": loss(1.0, 2.0), "b": loss(0.0, 0.0)}, Batch.fake())
    meter.settle(YES, torch.tensor(4.0))
    values = meter.take(alone)
    assert (values["a/loss"], values["b/loss"], values["gradient_norm"]) == (0.5, 0.0, 4.0)
