"""The sigmoid loss: the dense formula, what takes no part, how much of it is held at a time, and that its bias is learned and kept."""

from collections.abc import Callable
from math import exp, log
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.config import ModelConfig, ObjectivesConfig, OptimizerConfig
from vlm.data.batch import Batch
from vlm.errors import ConfigError
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives import sigmoid
from vlm.objectives.sigmoid import SigmoidContrastive
from vlm.settings import config_from_dict
from vlm.settings_check import check
from vlm.tasks.pretraining import Pretraining
from vlm.train.optimizer import build_optimizer, load_optimizer_state, optimizer_state

MakeBatch = Callable[..., Batch]
Features = Callable[[Batch, Tensor, Tensor], Any]
SIGMOID = ObjectivesConfig(matching=0.0, masked_language=0.0, contrastive_loss="sigmoid")


def unit(rows: int, seed: int = 0) -> Tensor:
    values = torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(values, dim=1).requires_grad_()


def texts(count: int) -> list[list[int]]:
    return [[2, 5 + i, 3] for i in range(count)]


def test_two_pairs_by_hand(heads: Any, make_batch: MakeBatch, make_features: Features) -> None:
    # Products [[0.6, 1.0], [0.8, 0.0]] over the temperature 0.5, minus 1: [[0.2, 1.0], [0.6, -1.0]].
    image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    batch = make_batch(texts(2))
    loss = SigmoidContrastive(-1.0).loss(heads, (), make_features(batch, image, text), batch)
    expected = log(1 + exp(-0.2)) + log(1 + exp(1.0)) + log(1 + exp(0.6)) + log(1 + exp(1.0))
    assert loss.sum.item() == pytest.approx(expected, rel=1e-6)
    assert loss.count == SigmoidContrastive().count(batch) == 2  # images, not pairs
    assert [value.item() for value in loss.scalars["accuracy"]] == [0, 2]


def test_equals_the_dense_formula_with_its_gradients(
    heads: Any, make_batch: MakeBatch, make_features: Features
) -> None:
    """Images in two slots and a bad slot among them."""
    image, text, objective = unit(6), unit(6, 1), SigmoidContrastive(-2.0).double()
    heads.temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    batch = make_batch(texts(6), image_ids=[1, 2, 3, 1, 5, 5], weight=[1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    loss = objective.loss(heads, (), make_features(batch, image, text), batch)
    kept = torch.arange(5)
    same = batch.image_ids[kept][:, None] == batch.image_ids[kept]
    logits = image[kept] @ text[kept].T / heads.temperature + objective.bias
    dense = -F.logsigmoid((2.0 * same - 1) * logits).sum() / 5
    torch.testing.assert_close(loss.sum / loss.count, dense, rtol=0, atol=1e-12)
    to = [image, text, heads.temperature, objective.bias]
    found, expected = torch.autograd.grad(loss.sum / 5, to), torch.autograd.grad(dense, to)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert b.abs().max() > 1e-4


def test_no_rank_holds_more_than_its_own_block_at_a_time(
    heads: Any, make_batch: MakeBatch, make_features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight ranks, of which this one sees the others' texts: its rows are never made against two ranks at once, nor kept for the backward pass."""
    rows, ranks = 16, 8
    batch = make_batch(texts(rows))
    image, text = unit(rows), unit(rows, 1)
    monkeypatch.setattr(sigmoid, "gather", lambda part: torch.cat([part] * ranks))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            made.extend(
                t.numel() for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)
            )
            return result

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Watch():
        loss = SigmoidContrastive().loss(heads, (), make_features(batch, image, text), batch)
        loss.sum.backward()
    assert max(made) == rows * 8 * ranks  # the texts themselves
    assert rows * rows in made
    assert rows * rows * ranks > 2 * max(made) - 1  # so that it would have been seen
    assert sum(size == rows * rows for size in kept) < 2 * ranks + 8


def test_a_batch_of_bad_samples_gives_zero_and_zero_gradients(
    heads: Any, make_batch: MakeBatch, make_features: Features
) -> None:
    image, text, objective = unit(3), unit(3, 1), SigmoidContrastive()
    batch = make_batch(texts(3), weight=[0.0, 0.0, 0.0])
    loss = objective.loss(heads, (), make_features(batch, image, text), batch)
    assert loss.sum == loss.count == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss.sum, [image, text, objective.bias]))


def test_autocast_leaves_it_in_fp32(heads: Any, make_batch: MakeBatch, make_features: Features) -> None:
    batch, objective = make_batch(texts(6)), SigmoidContrastive()
    features = make_features(batch, unit(6).float(), unit(6, 1).float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(heads, (), features, batch)
    torch.testing.assert_close(loss.sum, objective.loss(heads, (), features, batch).sum, rtol=0, atol=0)


def test_the_bias_is_learned_without_decay_and_kept(tiny_config: Callable[..., ModelConfig], batch: Batch) -> None:
    def made() -> tuple[Pretraining, torch.optim.Optimizer]:
        torch.manual_seed(0)
        task = Pretraining(VisionLanguageModel(tiny_config()), SIGMOID)
        return task, build_optimizer(task.model, OptimizerConfig(lr=0.1), task.learned)

    def step(task: Pretraining, optimizer: torch.optim.Optimizer) -> None:
        task(batch)["contrastive"].sum.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.after_step()

    task, optimizer = made()
    (group,) = (g for g in optimizer.param_groups if any(p is task.learned["contrastive"].bias for p in g["params"]))
    assert group["weight_decay"] == 0
    step(task, optimizer)
    state = {name: value.clone() for name, value in task.training_state().items()}
    assert list(state) == ["learned.contrastive.bias"]
    assert state["learned.contrastive.bias"] != -10
    again, resumed = made()
    again.model.load_state_dict(task.model.state_dict())
    again.load_training_state(state)
    load_optimizer_state(again.model, resumed, optimizer_state(task.model, optimizer, task.learned), again.learned)
    step(task, optimizer)
    step(again, resumed)
    assert again.learned["contrastive"].bias == task.learned["contrastive"].bias != state["learned.contrastive.bias"]


def test_it_learns_which_text_belongs_to_which_image(
    heads: Any, make_batch: MakeBatch, make_features: Features
) -> None:
    batch, objective = make_batch(texts(6)), SigmoidContrastive()
    image, text = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    heads = SimpleNamespace(temperature=torch.tensor(0.1))
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([image, text, objective.bias], lr=0.1)
    for _ in range(60):
        features = make_features(batch, F.normalize(image, dim=1), F.normalize(text, dim=1))
        loss = objective.loss(heads, (), features, batch)
        optimizer.zero_grad()
        loss.sum.backward()
        optimizer.step()
    right, count = loss.scalars["accuracy"]
    assert right == count == 6
    assert loss.sum / count < 0.1


def test_it_takes_no_queue_and_no_teacher_of_its_own() -> None:
    def refused(**objectives: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            check(config_from_dict({"objectives": {"contrastive_loss": "sigmoid", **objectives}}, "test"))
        return str(caught.value)

    assert "but objectives.contrastive_loss=sigmoid; use objectives.queue=0" in refused(momentum=0.9, queue=8)
    assert "no objective reads the teacher" in refused(momentum=0.9, masked_language=0.0)
