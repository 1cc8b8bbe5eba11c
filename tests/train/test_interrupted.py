"""An evaluation, or data that cannot be read, cost no step that was made: `latest` holds the last one, and going on gives the whole run."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vlm import run
from vlm.build import build_parts, evaluation_loader, load_sets
from vlm.cli import main
from vlm.config import Config
from vlm.data.batch import Batch
from vlm.data.loader import Loader
from vlm.errors import UserError
from vlm.run import train
from vlm.tasks.captioning import CaptioningTask
from vlm.train.distributed import Ranks
from vlm.train.report import read_json_lines
from vlm.train.stopping import StoppedOnRequest, stops_at_once

MakeConfig = Callable[..., Config]
LeftBy = Callable[[Path | str], tuple[Any, list[dict[str, Any]]]]
SETTINGS: dict[str, Any] = {
    "train.deterministic": True,
    "train.averaging": 0.9,
    "train.evaluate_every": 3,
    "train.save_every": 100,
    "data.batch_size": 4,
    "data.streams": 4,
    "train.epochs": 0.5,  # six steps
}


def saved(out: Path | str) -> Any:
    return torch.load(f"{out}/latest/training/state.pt", weights_only=True)


@pytest.fixture
def whole(make_config: MakeConfig, left_by: LeftBy, tmp_path: Path) -> tuple[Any, list[dict[str, Any]]]:
    config = make_config({**SETTINGS, "out": str(tmp_path / "whole")})
    train(config)
    found = left_by(config.out)
    assert [line["step"] for line in found[1] if line["kind"] == "evaluation"] == [3, 6]
    return found


def in_evaluation(monkeypatch: pytest.MonkeyPatch, number: int, batch: int, act: Callable[[], None]) -> list[int]:
    """Calls `act` before batch `batch` of the `number`-th evaluation is predicted. Counts the batches of each evaluation so far."""
    counts: list[int] = []
    evaluate, predict = run.evaluate_loader, CaptioningTask.predict

    def evaluating(*given: Any) -> Any:
        counts.append(0)
        return evaluate(*given)

    def predicting(self: CaptioningTask, batch_: Batch) -> Any:
        if counts:
            counts[-1] += 1
            if (len(counts), counts[-1]) == (number, batch):
                act()
        return predict(self, batch_)

    monkeypatch.setattr(run, "evaluate_loader", evaluating)
    monkeypatch.setattr(CaptioningTask, "predict", predicting)
    return counts


def fails() -> None:
    raise UserError("the evaluation cannot go on")


def term() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("act", "left_with"), [(fails, UserError), (term, StoppedOnRequest)])
def test_an_evaluation_that_ends_early_costs_nothing(
    whole: Any,
    make_config: MakeConfig,
    left_by: LeftBy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    act: Callable[[], None],
    left_with: type[Exception],
) -> None:
    """In the midst of the run and at its end. A request to stop is seen at the next batch, and the run that goes on begins with the evaluation."""
    config = make_config({**SETTINGS, "out": str(tmp_path / "parted")})
    with monkeypatch.context() as patch:
        counts = in_evaluation(patch, number, 2, act)
        with pytest.raises(left_with):
            train(config)
    assert counts[-1] == 2  # of three
    state = saved(config.out)
    assert (state["step"], state["evaluated"]) == (3 * number, 3 * number - 3)
    torch.manual_seed(1234)  # another process would have other numbers
    train(config, resume=True)
    assert left_by(config.out) == whole


def test_an_evaluation_that_the_state_does_not_know_is_told_once(
    whole: Any, make_config: MakeConfig, left_by: LeftBy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ended between the line of the log and the state that knows of it."""
    config = make_config({**SETTINGS, "out": str(tmp_path / "parted")})
    write = run.write_checkpoint

    def writing(folder: Path, *given: Any) -> Path:
        if folder.name == "best":
            raise UserError("the disk is full")
        return write(folder, *given)

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_checkpoint", writing)
        with pytest.raises(UserError):
            train(config)
    assert [line["kind"] for line in read_json_lines(Path(config.out) / "log.jsonl")][-1] == "evaluation"
    train(config, resume=True)
    assert left_by(config.out) == whole


def test_a_request_that_comes_with_the_last_batch_of_an_evaluation_is_seen(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(SETTINGS)
    in_evaluation(monkeypatch, 1, 3, term)
    with pytest.raises(StoppedOnRequest):
        train(config)
    state = saved(config.out)
    assert (state["step"], state["evaluated"]) == (3, 3)


@pytest.mark.parametrize("error", [UserError("the cache has no room"), RuntimeError("DataLoader worker was killed")])
def test_data_that_cannot_be_read_cost_no_step(
    whole: Any,
    make_config: MakeConfig,
    left_by: LeftBy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    config = make_config({**SETTINGS, "out": str(tmp_path / "parted")})
    iterate = Loader.iterate

    def broken(self: Loader, *given: Any, **named: Any) -> Iterator[Batch]:
        for number, batch in enumerate(iterate(self, *given, **named)):
            if self.training and number == 5:
                raise error
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "iterate", broken)
        with pytest.raises(type(error)) as caught:
            train(config)
    assert caught.value is error
    assert saved(config.out)["step"] == 5
    assert "step 5 is in" in capsys.readouterr().err
    train(config, resume=True)
    assert left_by(config.out) == whole


def test_data_that_cannot_be_read_at_all_leave_no_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Loader, *_: Any) -> Iterator[Batch]:
        raise UserError("nothing there")
        yield

    monkeypatch.setattr(Loader, "iterate", broken)
    config = make_config({**SETTINGS, "data.splits.val": []})
    with pytest.raises(UserError, match="nothing there"):
        train(config)
    assert not Path(config.out, "latest").exists()


# The first rank is asked to stop in an evaluation, then the second one cannot read its data.
TWO = """
import os, signal, sys
from vlm import run
from vlm.cli import main
from vlm.data.loader import Loader
from vlm.errors import UserError
from vlm.tasks.captioning import CaptioningTask

rank, iterate, predict, seen = int(os.environ["RANK"]), Loader.iterate, CaptioningTask.predict, []

def asked(self, batch):
    seen.append(batch)
    if rank == 0 and len(seen) == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return predict(self, batch)

def broken(self, *given, **named):
    for number, batch in enumerate(iterate(self, *given, **named)):
        if rank == 1 and self.training and number == 1:
            raise UserError("no room")
        yield batch

CaptioningTask.predict = asked
first = main(["train", sys.argv[1]])
Loader.iterate, CaptioningTask.predict = broken, predict
second = main(["train", sys.argv[1], "--resume", "auto"])
print(f"rank {rank}: {first} after {len(seen)}, {second}", flush=True)
"""


def test_ranks_leave_an_evaluation_and_broken_data_together(configured: Callable[..., Any], tmp_path: Path) -> None:
    config, out = configured("both", {"train.sharding": "fsdp"})
    (tmp_path / "two.py").write_text(TWO)
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, "--standalone", "--nproc-per-node", "2", tmp_path / "two.py", config]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {line[:6]: line[8:] for line in done.stdout.splitlines() if line.startswith("rank")} == {
        "rank 0": "3 after 1, 1",
        "rank 1": "3 after 1, 1",
    }, done.stderr
    assert "vlm: no room" in done.stderr
    assert "vlm: another rank cannot read its data, and says why." in done.stderr
    assert (saved(out)["step"], saved(out)["evaluated"]) == (4, 3)


def test_ranks_ask_equally_often_whatever_images_they_have(make_config: MakeConfig) -> None:
    """The last batch has a single image, so the second rank passes it over."""
    config = make_config({"data.batch_size": 4})
    shards = load_sets(config.data.splits.val, "val")[0]
    parts = build_parts(config, [shards])
    told = []
    for rank in range(2):
        asked: list[None] = []
        loader = evaluation_loader(config, parts, shards, Ranks(rank, 2, torch.device("cpu")))
        batches = list(run._Interruptible(loader, lambda asked=asked: asked.append(None)).iterate(0, stop_step=4))
        told.append((len(batches), len(asked)))
    assert told == [(4, 4), (3, 4)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_while_a_run_is_set_up_leaves_with_3(
    nested: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """Even where somebody takes every Exception for a fault of a file."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(nested(SETTINGS)))
    before = signal.getsignal(number)

    def vocabulary(*_: Any) -> None:
        try:
            os.kill(os.getpid(), number)
        except Exception:
            pytest.fail("somebody else's")

    with monkeypatch.context() as patch:
        patch.setattr("vlm.build.tokenizer_and_text", vocabulary)
        assert main(["train", str(tmp_path / "config.yaml")]) == 3
    said = capsys.readouterr().err
    assert f"{number.name}: leaving before the first step" in said
    assert "nothing was begun that had to be saved" in said
    assert signal.getsignal(number) is before


def test_a_fork_of_the_set_up_ends_as_any_process() -> None:
    with stops_at_once():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
