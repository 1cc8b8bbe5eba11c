"""The self-critical gradient is that of the expected reward."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.data.batch import Batch
from vlm.model.generation import Rules
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Features
from vlm.objectives.self_critical import SelfCritical

MakeModel = Callable[..., VisionLanguageModel]
END = 3


def features(model: VisionLanguageModel, batch: Batch) -> Features:
    image = model.encode_image(batch.images)
    return Features(image, {}, {"decoder": model.memory(image.tokens, None, "decoder")})


def captioned(images: int, **changes: Any) -> Batch:
    batch = Batch.fake(images)
    sources: list[dict[str, Any]] = [
        {"caption": f"text {i}", "references": [f"text {i}", "more"]} for i in range(images)
    ]
    return replace(batch, sources=sources, texts=replace(batch.texts, **changes))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_it_is_the_gradient_of_the_expected_reward(tiny_model: MakeModel, temperature: float) -> None:
    """With captions of one token the expectation is a sum over the vocabulary."""
    torch.manual_seed(0)
    model, batch = tiny_model().double().eval(), captioned(1)
    values = torch.rand(model.config.text.vocab_size, dtype=torch.float64)
    seen: list[Sequence[str]] = []

    def reward(drawn: Sequence[Sequence[int]], references: Sequence[Sequence[str]]) -> list[float]:
        seen.extend(references)
        return [float(values[ids[0] if ids else END]) for ids in drawn]

    objective = SelfCritical([2], Rules(end_id=END, max_length=1), reward, 4000, temperature)
    bias = model.language_head.bias
    loss = objective.loss(model, [], features(model, batch), batch)
    (got,) = torch.autograd.grad(loss.sum / loss.count, bias)
    memory = features(model, batch).memory["decoder"]
    probability = (model.decode(torch.tensor([[2]]), memory)[0, 0] / temperature).softmax(0)
    (expected,) = torch.autograd.grad(-(probability * values).sum(), bias)
    deviation = (
        probability * (1 - probability) / 4000
    ).sqrt() / temperature  # of one entry of the mean, for advantages of at most 1
    assert ((got - expected).abs() < 5 * deviation).all()
    assert torch.nn.functional.cosine_similarity(got, expected, dim=0) > 0.8
    assert seen == [["text 0", "more"]] * 4000
    total, count = loss.scalars["reward"]
    assert float(total / count) == pytest.approx(float((probability * values).sum()), abs=0.03)


def test_what_is_rewarded_becomes_likely(tiny_model: MakeModel) -> None:
    torch.manual_seed(0)
    model, batch = tiny_model().train(), captioned(3)
    wanted = 9
    objective = SelfCritical(
        [2], Rules(end_id=END, max_length=6), lambda drawn, _: [ids.count(wanted) / 6 for ids in drawn], samples=8
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rewards: list[float] = []
    for _ in range(60):
        loss = objective.loss(model, [], features(model, batch), batch)
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(float(loss.scalars["reward"][0] / loss.count))
    assert loss.count == objective.count(batch) == 24
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.8
    assert model.training


def test_the_end_is_learnt_and_equal_rewards_teach_nothing(tiny_model: MakeModel) -> None:
    objective = SelfCritical([2, 7], Rules(end_id=END, max_length=4), lambda drawn, _: [1.0] * len(drawn), samples=2)
    ids, mask, predicted = objective._texts([[5, 6], [5, 6, 7, 8], []], torch.device("cpu"))
    assert ids[:, :6].tolist() == [[2, 7, 5, 6, END, END], [2, 7, 5, 6, 7, 8], [2, 7, END, END, END, END]]
    assert mask.sum(1).tolist() == [5, 6, 3]
    assert predicted.sum(1).tolist() == [3, 4, 1]
    assert predicted[0].tolist() == [False, True, True, True, False, False, False]
    model, batch = tiny_model(), captioned(2)
    loss = objective.loss(model, [], features(model, batch), batch)
    assert all((g == 0).all() for g in torch.autograd.grad(loss.sum, list(model.language_head.parameters())))


@pytest.mark.parametrize("absent", [{"weight": torch.zeros(2)}, {"describes": torch.zeros(2, dtype=torch.bool)}])
def test_images_without_captions_take_no_part(tiny_model: MakeModel, absent: dict[str, Tensor]) -> None:
    def refuse(*_: object) -> list[float]:
        raise AssertionError("there is nothing to reward")

    objective = SelfCritical([2], Rules(end_id=END, max_length=4), refuse)
    model, batch = tiny_model(), captioned(2, **absent)
    loss = objective.loss(model, [], features(model, batch), batch)
    assert (float(loss.sum), int(loss.count)) == (0.0, 0)
    loss.sum.backward()


def test_references_are_all_captions_of_the_image_whatever_the_batch_has_as_texts(tiny_model: MakeModel) -> None:
    """The second image is described twice, the third is asked beside; the last text fills the batch up, as for ranks that compare."""
    seen: list[Sequence[str]] = []

    def reward(drawn: Sequence[Sequence[int]], references: Sequence[Sequence[str]]) -> list[float]:
        seen.extend(references)
        return [0.0] * len(drawn)

    batch, known = Batch.fake(5), (["a", "b"], ["c", "d"], ["e"])
    image, describes = torch.tensor([2, 1, 0, 1, 2]), torch.tensor([False, True, True, True, True])
    texts = replace(batch.texts, image=image, describes=describes)
    sources: list[dict[str, Any]] = [{"question": "?"}]
    sources += [{"caption": known[row][0], "references": known[row]} for row in image.tolist()[1:]]
    batch = replace(batch, images=batch.images[:3], texts=texts, sources=sources).filled_up(6)
    model = tiny_model()
    SelfCritical([2], Rules(end_id=END, max_length=4), reward, samples=2).loss(model, [], features(model, batch), batch)
    assert seen == [["a", "b"]] * 2 + [["c", "d"]] * 2 + [["e"]] * 2
