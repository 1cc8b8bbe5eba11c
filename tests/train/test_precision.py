"""auto: what the device is fast in. fp16: what is learned is what fp32 learns, an overflow is skipped without being held against the run, and
going on is exact."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vlm.build import build_parts, build_task, load_sets, training_loader
from vlm.config import Config, TrainConfig
from vlm.errors import UserError
from vlm.order_settings import as_begun
from vlm.run import train
from vlm.tasks.pretraining import Pretraining
from vlm.tasks.task import Task
from vlm.train.distributed import Ranks
from vlm.train.precision import LOWEST_SCALE, Precision, autocast, fastest, settled
from vlm.train.report import read_json_lines
from vlm.train.trainer import Trainer

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
HALF: dict[str, Any] = {"train.precision": "fp16", "data.splits.val": []}
TEACHER = {"task": "pretraining", "objectives.momentum": 0.9, "objectives.queue": 20, "train.averaging": 0.9}


def trainer_of(config: Config) -> Trainer:
    sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache)
    parts = build_parts(config, sets)
    task = build_task(parts.config, parts)
    return Trainer(task, training_loader(config, parts, sets, ALONE), config, ALONE, None, lambda name, *_: Path(name))


def state_of(config: Config) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(f"{config.out}/latest/training/state.pt", weights_only=True)
    return state


def lines_of(config: Config, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_json_lines(Path(config.out) / "log.jsonl") if line["kind"] == kind]


def start_at(monkeypatch: pytest.MonkeyPatch, scale: float, grow: int = 2000) -> None:
    """Every run's scale begins there, and doubles after `grow` good steps."""
    original = Precision.__init__

    def begin(self: Precision, name: str, device: torch.device) -> None:
        original(self, name, device)
        if self.scaler is not None:
            settings = self.scaler.state_dict()
            self.scaler.load_state_dict(settings | {"scale": scale, "growth_interval": grow})

    monkeypatch.setattr(Precision, "__init__", begin)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_matrix_products_run_in_the_precision_asked_for(name: str, dtype: torch.dtype) -> None:
    with autocast(name, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("known", "name"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True, "avx512_bf16": False}, "fp32")],
)
def test_auto_is_bf16_only_where_the_cpu_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], name: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert settled(Config(), ALONE).train.precision == name
    asked = Config(train=TrainConfig(precision="fp16"))
    assert settled(asked, ALONE) == asked


def test_auto_is_fp16_on_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, name in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert fastest(torch.device("cuda")) == name


def test_ranks_that_differ_train_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "gather", lambda self, items: [*items, "fp16"])
    assert settled(Config(), ALONE).train.precision == "fp32"


def test_a_run_goes_on_in_the_precision_that_auto_gave_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine, with other instructions, does not change it; a request does."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    config = make_config({"train.precision": "auto", "train.epochs": 0.34, "data.splits.val": []})
    train(config)
    assert yaml.safe_load(Path(config.out, "config.yaml").read_text())["train"]["precision"] == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert as_begun(config, Path(config.out)).train.precision == "fp32"
    asked = replace(config, train=replace(config.train, precision="bf16"))
    assert as_begun(asked, Path(config.out)).train.precision == "bf16"


def test_one_step_in_fp16_is_that_of_fp32_but_for_rounding(make_config: MakeConfig) -> None:
    """Gradients are unscaled before they are clipped: losses, the gradient's norm and every moment agree."""
    found = []
    for name in ("fp32", "fp16"):
        changes = {"model.text.dropout": 0.0, "model.text.attention_dropout": 0.0, "optimizer.clip": 0.5}
        trainer = trainer_of(make_config({**HALF, **changes, "train.precision": name}))
        trainer.task.train()
        micro, _ = trainer._next(trainer._batches())
        trainer._step(micro, trainer.meter)
        moments = torch.cat([m["exp_avg"].flatten() for m in trainer.state()["optimizer"].values()])
        found.append((trainer.meter.take(ALONE), moments))
    (exact, first), (half, second) = found
    assert exact["gradient_norm"] > 0.5  # it was clipped
    assert half["loss"] == pytest.approx(exact["loss"], rel=2e-3)
    assert half["loss"] != exact["loss"]
    assert half["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=1e-2)
    assert (first - second).norm() < 0.02 * first.norm()


def test_gradients_too_small_for_fp16_arrive_by_their_scale() -> None:
    """The gradient of the product's input is 2e-8 in every place, which fp16 rounds to 0."""
    arrived = []
    for name in ("fp16", "bf16"):
        weight = torch.nn.Parameter(torch.eye(4))
        optimizer = torch.optim.AdamW([weight], fused=True)
        precision = Precision(name, CPU)
        with precision.autocast():
            loss = 2e-8 * (torch.eye(4) @ weight).float().sum()
        precision.scaled(loss).backward()
        precision.unscale(optimizer)
        assert weight.grad is not None
        arrived.append(weight.grad)
    torch.testing.assert_close(arrived[0], torch.full((4, 4), 2e-8), rtol=1e-3, atol=0)
    torch.testing.assert_close(arrived[0], arrived[1], rtol=1e-2, atol=0)


def test_an_overflow_changes_nothing_and_lowers_the_scale_until_steps_are_made(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several overflows, though two skipped steps in a row would end the run; then the scale fits."""
    start_at(monkeypatch, 2.0**22)
    config = make_config({**HALF, **TEACHER, "train.epochs": 10 / 6, "train.max_skipped": 2})
    before: dict[str, torch.Tensor] = {}
    original = Pretraining.after_step
    untouched = 0

    def after_step(self: Any, taken: torch.Tensor) -> None:
        nonlocal untouched, before
        original(self, taken)
        # the queue's last row takes what is not kept
        now = {k: v[:-1].clone() if ".queue." in k and v.ndim else v.clone() for k, v in self.state_dict().items()}
        if not taken:
            assert all(torch.equal(v, now[k]) for k, v in before.items()), "a skipped step left a trace"
            untouched += 1
        before = now

    monkeypatch.setattr(Pretraining, "after_step", after_step)
    train(config)
    skipped = lines_of(config, "skipped")
    assert len(skipped) == untouched
    assert 2 < untouched < 9
    assert [line["step"] for line in skipped][:3] == [1, 2, 3]
    assert {line["cause"] for line in skipped} == {"overflow"}
    assert capsys.readouterr().err.count("overflowed fp16; skipped, the scale is halved") == untouched
    state = state_of(config)
    assert state["precision"]["scale"] == 2.0 ** (22 - untouched)
    assert (state["finite"]["skipped"], state["finite"]["in_a_row"]) == (untouched, 0)
    assert {int(m["step"]) for m in state["optimizer"].values()} == {10 - untouched}
    assert int(state["averaged"]["n_averaged"]) == int(state["task"]["teacher.steps"]) == 10 - untouched


@pytest.mark.parametrize("fault", ["gradient", "loss"])
def test_what_a_smaller_scale_does_not_mend_ends_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A gradient that stays infinite counts once the scale is at its floor; a loss, which is never scaled, at once."""
    start_at(monkeypatch, 4.0)
    config = make_config({**HALF, "train.epochs": 2, "train.max_skipped": 3})
    original = Task.forward

    def forward(self: Task, *given: Any) -> Any:
        losses = original(self, *given)
        for loss in losses.values():
            if fault == "loss":
                loss.sum.data.fill_(float("inf"))
            else:
                loss.sum.register_hook(lambda gradient: gradient * float("inf"))
        return losses

    monkeypatch.setattr(Task, "forward", forward)
    with pytest.raises(
        UserError, match=f"step {3 if fault == 'loss' else 5}: the loss or its gradient is not a finite"
    ):
        train(config)
    causes = [line.get("cause") for line in lines_of(config, "skipped")]
    assert causes == ([None] * 3 if fault == "loss" else ["overflow"] * 2 + [None] * 3)
    assert state_of(config)["precision"]["scale"] == LOWEST_SCALE


def test_going_on_is_exact_with_its_scale(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps at once, or three and three: the scale and the steps since it grew go on too."""
    start_at(monkeypatch, 256.0, grow=4)
    whole = make_config({**HALF, "out": str(tmp_path / "whole"), "train.averaging": 0.9})
    train(whole)
    halves = make_config({**HALF, "out": str(tmp_path / "halves"), "train.averaging": 0.9, "train.save_every": 3})
    original = Trainer.save

    def save(self: Trainer, name: str, with_state: bool) -> None:
        original(self, name, with_state)
        if self.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train(halves)
    assert (state_of(halves)["precision"]["scale"], state_of(halves)["precision"]["_growth_tracker"]) == (256.0, 3)
    train(halves, resume=True)
    a, b = state_of(whole), state_of(halves)
    assert a["precision"] == b["precision"]
    assert (a["precision"]["scale"], a["precision"]["_growth_tracker"]) == (512.0, 2)
    for part in ("model", "averaged"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
