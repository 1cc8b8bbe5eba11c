"""Compiled, a run learns what it learns as it is written; names of weights, evaluation and gradients between ranks stay as they are."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.build import build_parts, build_task, load_sets, training_loader
from vlm.config import Config
from vlm.tasks.task import Task
from vlm.train import compiling, trainer
from vlm.train.compiling import Compiled, uncompiled, watch_compiling
from vlm.train.distributed import Ranks
from vlm.train.trainer import Trainer

MakeConfig = Callable[..., Config]
ALONE = Ranks(0, 1, torch.device("cpu"))
# One layer, which reads the image; no dropout, whose random numbers are others in compiled code.
SMALL: dict[str, Any] = {
    "model.text.dropout": 0.0,
    "model.text.attention_dropout": 0.0,
    "model.text.layers": 1,
    "model.text.cross_attention": [0],
    "data.splits.val": [],
}


def steps(config: Config, count: int = 3) -> tuple[list[dict[str, float]], Trainer]:
    """The losses of the first steps, and the trainer."""
    sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache)
    parts = build_parts(config, sets)
    task = build_task(parts.config, parts)
    made = Trainer(task, training_loader(config, parts, sets, ALONE), config, ALONE, None, lambda name, *_: Path(name))
    made.cost.per_sample = 1.0  # nothing is counted: that runs uncompiled
    made.task.train()
    torch.manual_seed(0)
    batches = made._batches()
    losses = []
    for _ in range(count):
        made._step(made._next(batches)[0], made.meter)
        made.step += 1
        losses.append(made.meter.take(ALONE))
    return losses, made


def agree(config: Config, compiled: Config) -> tuple[Compiled, Trainer]:
    """Losses and gradients' norms do, step by step."""
    torch._dynamo.reset()
    plain, before = steps(config)
    found: list[Compiled] = []
    with watch_compiling(found):
        losses, after = steps(compiled)
    for one, two in zip(plain, losses, strict=True):
        assert set(one) == set(two)
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert list(before.task.state_dict()) == list(after.task.state_dict())
    return found[0], after


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graphs, forward and backward, run by PyTorch's own kernels: inductor's take minutes to be compiled."""
    monkeypatch.setattr(trainer, "compile_parts", lambda task: compiling.compile_parts(task, "aot_eager"))


@pytest.mark.usefixtures("without_kernels")
def test_losses_agree_without_a_break_of_the_graph(make_config: MakeConfig) -> None:
    found, after = agree(make_config(SMALL), make_config({**SMALL, "train.compile": True}))
    assert found.breaks.total() == 0
    assert 3 <= found.graphs <= 16
    assert found.again < found.graphs
    assert str(found).startswith(f"torch.compile: {found.graphs} graphs, {found.again} recompilations")
    batch = next(after._batches()).to("cpu")
    with torch.no_grad(), uncompiled(), watch_compiling(again := []):
        after.task.eval().encode_image(batch.images)
    assert again[0].graphs == 0


def test_a_break_is_told_with_its_reason() -> None:
    torch._dynamo.reset()

    def run(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    found: list[Compiled] = []
    with watch_compiling(found):
        torch.compile(run, backend="eager")(torch.ones(3))
    assert found[0].breaks.total() == 1
    assert "1 graph breaks (1 x " in str(found[0])


def test_every_part_of_model_and_teacher_is_named(make_config: MakeConfig) -> None:
    config = make_config({**SMALL, "task": "pretraining", "objectives.momentum": 0.9, "model.decoder": "separate"})
    parts = build_parts(config, load_sets(config.data.splits.train, "data.splits.train", config.data.cache))
    task = build_task(parts.config, parts)
    names = {id(module): name for name, module in task.named_modules()}
    kinds = ("image_encoder", "text", "fusion_memory", "decoder", "decoder_memory")
    expected = {f"{owner}.{kind}" for owner in ("model", "teacher.model") for kind in kinds}
    assert {names[id(part)] for part in task.heavy_parts()} == expected
    assert isinstance(task, Task)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_losses_agree_with_inductor(make_config: MakeConfig) -> None:
    found, _ = agree(make_config(SMALL), make_config({**SMALL, "train.compile": True}))
    assert found.breaks.total() == 0
