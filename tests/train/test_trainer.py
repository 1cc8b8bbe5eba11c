"""The loop: what a step computes, what is logged and kept, how it stops and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vlm.build import Parts, build_parts, build_task, load_sets, training_loader
from vlm.config import Config
from vlm.data.batch import Batch
from vlm.errors import ConfigError, UserError
from vlm.run import train
from vlm.tasks.task import Task
from vlm.train.distributed import Ranks
from vlm.train.meter import Meter
from vlm.train.optimizer import schedule
from vlm.train.report import read_json_lines
from vlm.train.trainer import StoppedOnRequest, Trainer

MakeConfig = Callable[..., Config]
ALONE = Ranks(0, 1, torch.device("cpu"))
ALL_OBJECTIVES = {"task": "pretraining", "objectives.captioning": 1.0}
LeftBy = Callable[[Path | str], tuple[Any, list[dict[str, Any]]]]


def build(config: Config, evaluate: Any = None, save: Any = None) -> Trainer:
    """A trainer as `vlm train` makes it, with another evaluation and another place to save."""
    sets = load_sets(config.data.splits.train, "data.splits.train")
    parts: Parts = build_parts(config, sets)
    task = build_task(parts.config, parts)
    loader = training_loader(config, parts, sets, ALONE)
    return Trainer(task, loader, config, ALONE, evaluate, save or (lambda name, *_: Path(name)))


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, request: Callable[[], None]) -> None:
    """Calls `request` inside optimizer step number `step`."""
    done = 0
    original = Task.after_step

    def after_step(self: Task, taken: torch.Tensor) -> None:
        nonlocal done
        original(self, taken)
        done += 1
        if done == step:
            request()

    monkeypatch.setattr(Task, "after_step", after_step)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def train_lines(out: Path | str) -> list[dict[str, Any]]:
    return [line for line in read_json_lines(Path(out) / "log.jsonl") if line["kind"] == "train"]


def test_the_loss_falls_and_the_log_says_everything(make_config: MakeConfig) -> None:
    config = make_config({"train.epochs": 4, "model.text.dropout": 0.0, "optimizer.lr": 5e-3})
    scores = train(config)
    lines = train_lines(config.out)
    assert [line["step"] for line in lines] == list(range(1, 25))
    losses = [line["loss"] for line in lines]
    assert sum(losses[-6:]) / 6 < 0.8 * losses[0]
    for line in lines:
        assert {
            "samples_per_second",
            "data_wait",
            "kind",
            "step",
            "epoch",
            "loss",
            "lr",
            "gradient_norm",
            "temperature",
            "filled",
        } <= set(line)
        assert {"captioning/loss", "captioning/accuracy"} <= set(line)
        assert line["epoch"] == line["step"] / 6
        assert line["loss"] == line["captioning/loss"]
        assert 0 <= line["data_wait"] <= 1
    assert [line["lr"] for line in lines[:2]] == [0.0025, 0.005]  # warm-up
    assert all("eta_seconds" in line for line in lines[4:])
    assert lines[-1]["eta_seconds"] == 0
    evaluations = [line for line in read_json_lines(Path(config.out) / "log.jsonl") if line["kind"] == "evaluation"]
    assert [line["step"] for line in evaluations] == [6, 12, 18, 24]
    assert evaluations[-1]["scores"] == scores
    assert scores["scenes"]["images"] == 13
    assert all(line["selects"] == line["scores"]["scenes"]["CIDEr"] for line in evaluations)
    out = Path(config.out)
    assert sorted(p.name for p in out.iterdir()) == ["best", "config.yaml", "latest", "log.jsonl", "samples"]
    assert (out / "latest" / "training" / "state.pt").exists()
    assert not (out / "best" / "training").exists()
    assert yaml.safe_load((out / "config.yaml").read_text())["optimizer"]["lr"] == 5e-3


def test_the_rate_that_is_logged_is_the_one_of_the_step(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"data.splits.val": [], "optimizer.lr_factors": {"image_encoder": 0.5}})
    used: list[set[float]] = []
    step = torch.optim.AdamW.step

    def stepped(self: torch.optim.AdamW) -> None:
        used.append({group["lr"] for group in self.param_groups})
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    train(config)
    factor = schedule(config.optimizer, 6, 6)
    planned = [config.optimizer.lr * factor(i) for i in range(6)]
    assert len(set(planned)) > 4
    assert [line["lr"] for line in train_lines(config.out)] == pytest.approx(planned)
    assert [max(rates) for rates in used] == pytest.approx(planned)
    assert [min(rates) for rates in used] == pytest.approx([0.5 * rate for rate in planned])


def step_once(config: Config) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The losses of one step of plain gradient descent, and the weights after it."""
    trainer = build(config)
    groups = [{k: g[k] for k in ("params", "factor", "lr")} for g in trainer.optimizer.param_groups]
    trainer.optimizer = torch.optim.SGD(groups, lr=1.0)  # type: ignore[assignment]  # Adam divides by what may be rounding alone
    meter = Meter(trainer.task.weights)
    trainer.task.train()
    micro, _ = trainer._next(trainer._batches())
    assert [len(batch) for batch in micro] == [8 // config.train.accumulate] * config.train.accumulate
    trainer._step(micro, meter)
    return meter.take(ALONE), [p.detach() for p in trainer.task.model.parameters()]


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_accumulated_micro_batches_equal_the_whole_batch(make_config: MakeConfig, accumulate: int, clip: float) -> None:
    quiet = {"model.text.dropout": 0.0, "model.text.attention_dropout": 0.0, "model.image.batch_norm": "frozen"}
    settings = {**quiet, "optimizer.lr": 1.0, "optimizer.clip": clip, "optimizer.warmup_steps": 0}
    losses, weights = step_once(make_config(settings))
    parted, parted_weights = step_once(make_config({**settings, "train.accumulate": accumulate}))
    assert parted == pytest.approx(losses, abs=1e-6)
    for a, b in zip(weights, parted_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    fresh = build(make_config(settings)).task.model.parameters()
    assert max(float((a - b).detach().abs().max()) for a, b in zip(weights, fresh, strict=True)) > 1e-3  # it did step


def test_the_weights_saved_are_those_that_are_evaluated(make_config: MakeConfig) -> None:
    """With averaging on: the average, which is neither the last weights nor those at the start."""
    evaluated: list[dict[str, torch.Tensor]] = []
    saved: dict[str, Any] = {}

    def evaluate(task: Task) -> tuple[dict[str, Any], float]:
        assert not task.model.training
        evaluated.append({k: v.clone() for k, v in task.model.state_dict().items()})
        return {}, 1.0

    def save(name: str, model: torch.nn.Module, scores: Any, state: Any) -> Path:
        saved[name] = ({k: v.clone() for k, v in model.state_dict().items()}, state)
        return Path(name)

    trainer = build(make_config({"train.averaging": 0.9}), evaluate, save)
    trainer.fit()
    assert trainer.task.model.training
    for weights, _ in saved.values():
        assert all(torch.equal(weights[k], v) for k, v in evaluated[0].items())
    last = trainer.task.model.state_dict()
    assert not torch.equal(last["language_head.bias"], evaluated[0]["language_head.bias"])
    assert torch.equal(saved["latest"][1]["model"]["language_head.bias"], last["language_head.bias"])
    assert saved["best"][1] is None


def test_best_is_kept_when_a_later_evaluation_is_worse(make_config: MakeConfig) -> None:
    values = iter([2.0, 3.0, 1.0, 3.0, 2.5, 2.9])
    events: list[tuple[str, int]] = []
    config = make_config({"train.evaluate_every": 1, "train.log_every": 3})
    trainer = build(config, lambda _: ({"s": {}}, next(values)), lambda name, *_: events.append((name, trainer.step)))
    trainer.fit()
    assert [step for name, step in events if name == "best"] == [1, 2]
    before = [1, 2, 3, 4, 5, 6]  # each evaluation, which may fail
    assert [step for name, step in events if name == "latest"] == [*before, 6]  # and with the last scores
    assert trainer.best == 3.0
    flags = [line["best"] for line in read_json_lines(Path(config.out) / "log.jsonl") if line["kind"] == "evaluation"]
    assert flags == [True, True, False, False, False, False]


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    make_config: MakeConfig, left_by: LeftBy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an epoch, at its end where an evaluation is due, and past it; with dropout, negatives drawn at random, averaging, teacher and queue."""
    chance = {"train.averaging": 0.9, "data.randaugment": [1, 5]}
    teacher = {"objectives.momentum": 0.9, "objectives.queue": 20, "objectives.easy_negatives": 0.5}
    settings = {**ALL_OBJECTIVES, **chance, **teacher, "train.epochs": 1.5, "train.deterministic": True}
    whole = make_config({**settings, "out": str(tmp_path / "whole")})
    train(whole)
    want = left_by(whole.out)
    assert {"image_encoder.positions", "temperature"} <= set(want[0]["optimizer"])
    assert {"teacher.steps", "teacher.queue.text", "teacher.model.temperature"} <= set(want[0]["task"])
    for stop in (4, 6, 8):
        parted = make_config({**settings, "out": str(tmp_path / f"parted{stop}")})
        with monkeypatch.context() as patch:
            stop_after(patch, stop, terminate)
            with pytest.raises(StoppedOnRequest):
                train(parted)
        last = read_json_lines(Path(parted.out) / "log.jsonl")[-1]
        assert (last["kind"], last["step"]) == ("train", stop)  # an evaluation that is due does not hold it up
        torch.manual_seed(1234)  # another process would have other numbers
        train(parted, resume=True)
        for name in ("latest", "best"):
            a, b = (load_file(f"{config.out}/{name}/model.safetensors") for config in (whole, parted))
            assert all(torch.equal(a[key], b[key]) for key in a)
        assert left_by(parted.out) == want
    assert not torch.are_deterministic_algorithms_enabled()


def test_hidden_and_dropped_patches_of_micro_batches_resume_bit_for_bit(
    make_config: MakeConfig, left_by: LeftBy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = {"name": "test_vit", "image_size": 64, "stages": 0, "patch_drop": 0.5}
    masked = {"objectives.masked_image": 1.0, "objectives.word_patch": 0.1, "data.splits.val": []}
    settings = {**ALL_OBJECTIVES, **masked, "model.image": image, "train.deterministic": True, "train.accumulate": 2}
    whole, parted = (make_config({**settings, "out": str(tmp_path / name)}) for name in ("whole", "parted"))
    train(whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 4, terminate)
        with pytest.raises(StoppedOnRequest):
            train(parted)
    torch.manual_seed(1234)
    train(parted, resume=True)
    want = left_by(whole.out)
    assert "learned.masked_image.mask_token" in want[0]["task"]
    assert {"masked_image.mask_token", "word_patch.projection.weight"} <= set(want[0]["optimizer"])
    assert left_by(parted.out) == want


@pytest.fixture
def finished(make_config: MakeConfig) -> Config:
    """A run of three steps that is done."""
    config = make_config({"train.epochs": 0.5, "data.splits.val": []})
    train(config)
    return config


def contents(folder: Path | str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_what_would_spoil_a_run_is_refused(
    finished: Config, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished.out)
    with pytest.raises(
        ConfigError, match=r"holds a run already; add --resume auto .*, choose another --out, or remove it"
    ):
        train(finished)
    Path(finished.out, "log.jsonl").rename(Path(finished.out, "log"))
    with pytest.raises(ConfigError, match="holds a run already"):
        train(finished)
    Path(finished.out, "log").rename(Path(finished.out, "log.jsonl"))
    for changes, reason in [
        (
            {"train.epochs": 1},
            r"saved run has 3 steps in all, but these settings and data give 6; resume with the settings",
        ),
        (
            {"model.text.dim": 64},
            r"saved run does not fit these settings \(.*size mismatch.*; resume with the settings",
        ),
        (
            {"model.image.frozen": True},
            r"saved run does not fit these settings \(the optimizer's state is of other parameters",
        ),
    ]:
        with pytest.raises(UserError, match=reason) as caught:
            train(make_config({"train.epochs": 0.5, "data.splits.val": [], **changes}), resume=True)
        assert "\n" not in str(caught.value)
    assert contents(finished.out) == before
    train(finished, resume=True)
    assert "is finished: 3 of 3 steps are done" in capsys.readouterr().err
    assert contents(finished.out) == before


def test_resume_begins_a_run_that_was_killed_before_its_first_save(make_config: MakeConfig) -> None:
    config = make_config({"train.epochs": 0.5, "data.splits.val": []})
    Path(config.out).mkdir()
    Path(config.out, "log.jsonl").write_text('{"kind": "train", "step": 1}\n')
    train(config, resume=True)
    assert [line["step"] for line in train_lines(config.out)] == [1, 2, 3]


def test_resume_needs_the_state(finished: Config) -> None:
    Path(finished.out, "latest", "training", "state.pt").unlink()
    with pytest.raises(UserError, match=r"has no training/state\.pt"):
        train(finished, resume=True)


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"train.save_every": 1, "data.splits.val": []})
    done = 0
    original = torch.save

    def save(*args: Any, **kwargs: Any) -> None:
        nonlocal done
        done += 1
        if done == 3:
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")
        original(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(
        UserError, match=r"latest: could not be saved \(.*the disk seems full.*what was there before is untouched"
    ):
        train(config)
    assert torch.load(f"{config.out}/latest/training/state.pt", weights_only=True)["step"] == 2
    assert sorted(p.name for p in Path(config.out).iterdir()) == ["config.yaml", "latest", "log.jsonl"]
    train(config, resume=True)
    assert [line["step"] for line in train_lines(config.out)] == [1, 2, 3, 4, 5, 6]


def test_too_few_batches_for_one_step(make_config: MakeConfig) -> None:
    class Short:
        steps = 1

        def iterate(self, epoch: int, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
            return iter(())

    task = build(make_config()).task
    with pytest.raises(UserError, match=r"give 1 batches an epoch, fewer than train\.accumulate=2; use a smaller"):
        Trainer(task, Short(), make_config({"train.accumulate": 2}), ALONE, None, lambda *_: Path())  # type: ignore[arg-type]


def test_term_saves_and_leaves_with_3_and_resume_ends_the_run(
    nested: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cluster does it, with the real command in a process of its own and a worker that must not die of the signal."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other on a busy machine take minutes
    values = nested({"train.epochs": 10, "train.save_every": 1000, "data.splits.val": [], "data.workers": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    out = Path(values["out"])
    command = [sys.executable, "-m", "vlm", "train", str(tmp_path / "config.yaml"), "--optimizer.lr", "1e-3"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not train_lines(out) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 3, errors
    assert "SIGTERM: saving after this step" in errors
    assert f"go on with: vlm train {tmp_path}/config.yaml --optimizer.lr 1e-3 --resume auto" in errors
    assert "Traceback" not in errors
    stopped_at = train_lines(out)[-1]["step"]
    assert stopped_at < 60
    done = subprocess.run([*command, "--resume", "auto"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {stopped_at}" in done.stderr
    assert [line["step"] for line in train_lines(out)] == list(range(1, 61))
    assert json.loads((out / "latest" / "config.json").read_text())["task"] == "captioning"
