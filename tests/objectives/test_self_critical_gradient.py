"""The self-critical gradient sample by sample: each one's baseline is the mean reward of the others, and all are drawn without dropout."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from vlm.data.batch import Batch
from vlm.model.generation import Rules
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Features
from vlm.objectives.self_critical import SelfCritical

MakeModel = Callable[..., VisionLanguageModel]
START, END, LONGEST = 2, 3, 5


class Rewarded:
    """A reward that remembers what was drawn."""

    def __init__(self) -> None:
        self.drawn: list[list[int]] = []
        self.values: list[float] = []

    def __call__(self, drawn: Sequence[Sequence[int]], references: Sequence[Sequence[str]]) -> list[float]:
        self.drawn = [list(ids) for ids in drawn]
        self.values = [float((sum(ids) % 7) ** 2) for ids in drawn]
        return self.values


def memory_of(model: VisionLanguageModel, batch: Batch) -> Features:
    image = model.encode_image(batch.images)
    return Features(image, {}, {"decoder": model.memory(image.tokens, None, "decoder")})


def captioned(images: int) -> Batch:
    sources: list[dict[str, Any]] = [{"caption": "a text", "references": ["a text"]} for _ in range(images)]
    return replace(Batch.fake(images), sources=sources)


def test_a_samples_baseline_is_the_mean_reward_of_the_others(tiny_model: MakeModel) -> None:
    torch.manual_seed(0)
    model, batch, samples = tiny_model().double().eval(), captioned(2), 3
    reward = Rewarded()
    objective = SelfCritical([START], Rules(end_id=END, max_length=LONGEST), reward, samples)
    loss = objective.loss(model, [], memory_of(model, batch), batch)
    (got,) = torch.autograd.grad(loss.sum, model.language_head.bias)
    memory = memory_of(model, batch).memory["decoder"]
    total = torch.zeros((), dtype=torch.float64)
    for row, (ids, value) in enumerate(zip(reward.drawn, reward.values, strict=True)):
        first = row - row % samples
        others = [reward.values[i] for i in range(first, first + samples) if i != row]
        rest = [*ids, *([END] if len(ids) < LONGEST else [])]
        after = model.decode(torch.tensor([[START, *rest]]), memory.select(torch.tensor([row // samples])))[0]
        said = after.log_softmax(1)[torch.arange(len(rest)), torch.tensor(rest)].sum()
        total = total - (value - sum(others) / (samples - 1)) * said
    (expected,) = torch.autograd.grad(total, model.language_head.bias)
    assert float(loss.sum.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    assert expected.abs().max() > 1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_samples_are_drawn_without_dropout_and_training_goes_on_with_it(tiny_model: MakeModel) -> None:
    model, batch = tiny_model(text={"dropout": 0.5}), captioned(4)
    reward = Rewarded()
    objective = SelfCritical([START], Rules(end_id=END, max_length=LONGEST), reward, 4)
    drawn = []
    for training in (True, False):
        model.train(training)
        features = memory_of(model, batch)
        torch.manual_seed(1)
        objective.loss(model, [], features, batch)
        drawn.append(reward.drawn)
        assert model.training == training
    assert drawn[0] == drawn[1]
    assert len({tuple(ids) for ids in drawn[0]}) > 4
