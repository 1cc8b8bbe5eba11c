"""A step that is not finite changes nothing and is named; several in a row end the run with the last good state."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlm.build import build_parts, build_task, load_sets, training_loader
from vlm.config import Config
from vlm.errors import UserError
from vlm.run import train
from vlm.tasks.task import Task
from vlm.train.distributed import Ranks
from vlm.train.report import read_json_lines
from vlm.train.trainer import StoppedOnRequest, Trainer

MakeConfig = Callable[..., Config]
ALONE = Ranks(0, 1, torch.device("cpu"))
NAN = float("nan")


def poison_gradient(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The gradients of these optimizer steps, counted from 1, become a NaN in one place."""
    done = 0
    original = torch.nn.utils.clip_grad_norm_

    def clip(parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
        nonlocal done
        done += 1
        if done in steps:
            next(p.grad for p in parameters if p.grad is not None).view(-1)[0] = NAN
        return original(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


def poison_loss(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The first loss of these steps is infinite, its gradient is not; the images become NaN as well, so batch norm sees some."""
    done = 0
    original = Task.forward

    def forward(self: Task, batch: Any, *rest: Any) -> Any:
        nonlocal done
        done += 1
        if done in steps:
            self.model.image_encoder(torch.full((2, 3, 32, 32), NAN))
        losses = original(self, batch, *rest)
        if done in steps:
            next(iter(losses.values())).sum.data.fill_(float("inf"))
        return losses

    monkeypatch.setattr(Task, "forward", forward)


def trainer_of(config: Config) -> Trainer:
    sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache)
    parts = build_parts(config, sets)
    task = build_task(parts.config, parts)
    return Trainer(task, training_loader(config, parts, sets, ALONE), config, ALONE, None, lambda name, *_: Path(name))


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a step may change, but for the position and the random numbers. The queue's last row takes what is not kept."""
    state = trainer.state()
    assert trainer.averaging.averaged is not None
    found = {f"task.{k}": v for k, v in trainer.task.state_dict().items()}
    found |= {f"averaged.{k}": v for k, v in trainer.averaging.averaged.state_dict().items()}
    found |= {f"optimizer.{n}.{k}": v for n, moments in state["optimizer"].items() for k, v in moments.items()}
    return {k: (v[:-1] if ".queue." in k and v.ndim else v).clone() for k, v in found.items()}


@pytest.mark.parametrize("poison", [poison_gradient, poison_loss])
def test_nothing_changes_in_a_step_that_is_not_finite(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, poison: Callable[..., None]
) -> None:
    """Weights, moments, batch-norm statistics, average, teacher and queue; and the next step is made."""
    teacher = {"objectives.momentum": 0.9, "objectives.queue": 20, "train.averaging": 0.9}
    trainer = trainer_of(make_config({"task": "pretraining", **teacher, "data.splits.val": []}))
    trainer.task.train()
    batches = trainer._batches()
    states = []
    poison(monkeypatch, 2)
    for _ in range(3):
        micro, _ = trainer._next(batches)
        trainer._step(micro, trainer.meter)
        trainer.step += 1
        states.append(everything(trainer))
    first, skipped, last = states
    assert {k for k in first if not torch.equal(first[k], skipped[k])} == set()
    changed = {k for k in first if not torch.equal(skipped[k], last[k])}
    parts = (
        "task.model.text",
        "task.teacher.model",
        "task.teacher.queue.image",
        "task.teacher.steps",
        "averaged.module",
    )
    for part in (*parts, "averaged.n_averaged", "optimizer.temperature.step", "optimizer.temperature.exp_avg"):
        assert any(k.startswith(part) for k in changed), part
    assert any(k.endswith("running_mean") and k.startswith("task.model") for k in changed)
    assert all(v.isfinite().all() for v in last.values())


def test_skipped_steps_are_counted_named_and_leave_no_trace_in_the_curve(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config({"train.log_every": 2, "data.splits.val": []})
    poison_gradient(monkeypatch, 2, 5, 6)
    train(config)
    lines = read_json_lines(Path(config.out) / "log.jsonl")
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert [line["step"] for line in skipped] == [2, 5, 6]
    assert all(len(line["keys"]) == 8 for line in skipped)
    assert len({key for line in skipped for key in line["keys"]}) == 24
    told = [line for line in lines if line["kind"] == "train"]
    assert [(line["step"], line["skipped"]) for line in told] == [(2, 1), (4, 1)]  # of 5 and 6 there is nothing to tell
    assert all(0 < line["loss"] < 20 and 0 < line["gradient_norm"] < 1e4 for line in told)
    assert capsys.readouterr().err.count("is not a finite number; skipped") == 3
    state = torch.load(f"{config.out}/latest/training/state.pt", weights_only=True)
    assert (state["step"], state["finite"]["skipped"]) == (6, 3)


@pytest.mark.parametrize("log_every", [1, 100])
def test_several_in_a_row_end_the_run_with_the_last_good_state(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    limits = {"train.max_skipped": 3, "train.log_every": log_every, "train.save_every": 100}
    config = make_config({"train.epochs": 2, **limits, "data.splits.val": []})
    poison_gradient(monkeypatch, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12)  # two in a row are not enough
    with pytest.raises(UserError) as caught:
        train(config)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("step 6: the loss or its gradient is not a finite number")
    assert "`latest` holds the last good state, log.jsonl the keys" in message
    assert "lower optimizer.lr" in message
    lines = [line for line in read_json_lines(Path(config.out) / "log.jsonl") if line["kind"] == "skipped"]
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6]
    assert ", ".join(lines[-1]["keys"][:3]) in message
    saved = torch.load(f"{config.out}/latest/training/state.pt", weights_only=True)
    assert saved["step"] == 6
    weights = load_file(f"{config.out}/latest/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())
    assert {int(moments["step"]) for moments in saved["optimizer"].values()} == {1}  # the one step that was made
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train(config, resume=True)  # behind what was skipped
    steps = [line["step"] for line in read_json_lines(Path(config.out) / "log.jsonl") if line["kind"] == "train"]
    assert steps[-1] == 12


def test_skipped_steps_count_in_a_row_across_a_resumption(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two before the run was stopped and one after it are three."""
    config = make_config({"train.max_skipped": 3, "data.splits.val": []})
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        poison_gradient(patch, 2, 3)
        step = Trainer._step

        def stepped(self: Trainer, *given: Any) -> None:
            step(self, *given)
            if self.step + 1 == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Trainer, "_step", stepped)
        with pytest.raises(StoppedOnRequest):
            train(config)
    poison_gradient(monkeypatch, 1)
    with pytest.raises(UserError, match=r"^step 4: .*, train\.max_skipped=3 in all"):
        train(config, resume=True)


def test_a_run_without_a_single_step_is_not_done(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it has fewer steps than may be skipped in a row."""
    config = make_config({"train.max_skipped": 7})
    poison_gradient(monkeypatch, *range(1, 7))
    with pytest.raises(
        UserError, match="none of the 6 steps could be made, as the loss or its gradient was never a finite"
    ):
        train(config)
    assert not Path(config.out, "best").exists()
    assert "done" not in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_saved(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they came about: here by the optimizer itself."""
    config = make_config({"train.save_every": 1, "data.splits.val": []})
    done = 0
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW) -> None:
        nonlocal done
        done += 1
        original(self)
        if done == 3:
            self.param_groups[0]["params"][0].data.fill_(NAN)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(UserError, match="step 3: the weights are not finite numbers; latest stays as it was"):
        train(config)
    assert torch.load(f"{config.out}/latest/training/state.pt", weights_only=True)["step"] == 2
