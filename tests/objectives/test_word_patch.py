"""Word-patch alignment: the plan is the optimal one, the formula is ViLT's, padding is not there, and the loss is what it says."""

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vlm.data.batch import Batch
from vlm.model.vision_language import ImageFeatures, TextFeatures
from vlm.objectives.objective import Features, Loss
from vlm.objectives.word_patch import WordPatch, next_other, transport, words

MakeBatch = Callable[..., Batch]
MODEL: Any = SimpleNamespace(image_encoder=SimpleNamespace(prefix=1))


def costs(*shape: int, seed: int = 0) -> Tensor:
    """Between 0 and 2, as 1 - cosine is."""
    return 2 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def all_rows(cost: Tensor) -> Tensor:
    return torch.ones(cost.shape[:2], dtype=torch.bool)


def vilt(cost: NDArray, beta: float = 0.5, iterations: int = 50) -> NDArray:
    """IPOT (Xie et al. 2020, algorithm 1) of one problem, number by number: patches to words, as ViLT has them."""
    count, columns = cost.shape
    plan, sigma = np.ones((columns, count)), np.ones(count) / count
    for _ in range(iterations):
        step = np.array([[np.exp(-cost[i, j] / beta) * plan[j, i] for i in range(count)] for j in range(columns)])
        delta = [1 / (columns * sum(step[j, i] * sigma[i] for i in range(count))) for j in range(columns)]
        sigma = np.array([1 / (count * sum(delta[j] * step[j, i] for j in range(columns))) for i in range(count)])
        plan = np.array([[delta[j] * step[j, i] * sigma[i] for i in range(count)] for j in range(columns)])
    return plan.T


def test_it_is_vilts_formula_without_padding() -> None:
    cost = costs(3, 5, 7)
    rows = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]).bool()
    plan = transport(cost, rows)
    for row in range(3):
        torch.testing.assert_close(
            plan[row][rows[row]], torch.tensor(vilt(cost[row][rows[row]].numpy())), rtol=0, atol=1e-12
        )
        assert not plan[row][~rows[row]].any()


@pytest.mark.parametrize(("count", "columns"), [(4, 4), (6, 6), (2, 6), (3, 6)])
def test_it_is_the_optimal_transport(count: int, columns: int) -> None:
    """Of all ways to carry equal parts, brute force: each word is as many equal parts as it has patches."""
    cost = costs(8, count, columns, seed=3)
    best = []
    for one in cost.repeat_interleave(columns // count, dim=1):
        ways = torch.tensor(list(permutations(range(columns))))
        best.append(one[torch.arange(columns), ways].sum(1).min() / columns)
    plan = transport(cost, all_rows(cost), iterations=2000)
    found = (cost * plan).sum((1, 2))
    torch.testing.assert_close(found, torch.stack(best), rtol=0, atol=2e-3)
    near = (cost * transport(cost, all_rows(cost))).sum((1, 2))  # ViLT's 50 iterations
    torch.testing.assert_close(near, found, rtol=0, atol=5e-2)


def test_its_marginals() -> None:
    cost = costs(4, 3, 6)
    errors = []
    for iterations in (5, 50, 500):
        plan = transport(cost, all_rows(cost), iterations=iterations)
        torch.testing.assert_close(plan.sum(2), torch.full((4, 3), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-12)
        errors.append(float((plan.sum(1) - 1 / 6).abs().max()))
    assert errors[0] > errors[2]
    assert errors[2] < 1e-3
    assert (plan >= 0).all()


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_extreme_costs_stay_finite_in_fp32(value: float) -> None:
    cost = torch.full((2, 9, 40), value)
    cost[0, 4] = 2 - value
    cost[1, :, 7] = 2 - value
    plan = transport(cost, torch.tensor([[True] * 9, [True] + [False] * 8]), iterations=500)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum((1, 2)), torch.ones(2))
    assert not transport(cost, torch.zeros(2, 9, dtype=torch.bool)).any()


def test_the_plan_is_the_gradient_of_the_distance() -> None:
    cost = costs(1, 3, 3, seed=1).requires_grad_()
    plan = transport(cost, all_rows(cost), iterations=3000)
    assert not plan.requires_grad
    (gradient,) = torch.autograd.grad((cost * plan).sum(), cost)
    assert torch.equal(gradient, plan)
    # Which it truly is, the plan's own change included.
    moved = cost.detach() + 1e-3 * torch.eye(9, dtype=torch.float64).view(9, 3, 3)
    distances = (moved * transport(moved, all_rows(moved), iterations=3000)).sum((1, 2))
    slope = (distances - (cost * plan).sum().detach()) / 1e-3
    torch.testing.assert_close(slope, plan.flatten(), rtol=0, atol=1e-2)


def given(make_batch: MakeBatch, **settings: Any) -> tuple[Batch, Features, WordPatch]:
    """Four texts of two to four words with an image each; patches behind one class token."""
    torch.manual_seed(0)
    batch = make_batch(torch.randint(5, 20, (4, 8)).tolist(), lengths=[4, 6, 5, 6], **settings)
    states = torch.randn(4, 8, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(4, 1 + 5, 3, dtype=torch.float64, requires_grad=True)
    text = TextFeatures(batch.texts.ids, batch.texts.mask, states)
    return batch, Features(ImageFeatures(tokens), {"plain": text}, {}), WordPatch(3, 6).double()


def loss(batch: Batch, features: Features, objective: WordPatch) -> Loss:
    found = objective.loss(MODEL, [], features, batch)
    assert found.count == objective.count(batch)
    return found


def test_the_loss_by_hand(make_batch: MakeBatch) -> None:
    batch, features, objective = given(make_batch, prompt=[1, 3, 1, 1], image_ids=[7, 7, 8, 9])
    spans, strangers = [(1, 3), (3, 5), (1, 4), (1, 5)], [2, 2, 3, 0]
    text = features.texts["plain"].states
    assert text is not None

    def distance(row: int, image: int) -> float:
        first, last = spans[row]
        patches = F.normalize(objective.projection(features.image.tokens[image, 1:]), dim=1)
        cost = 1 - F.normalize(text[row, first:last], dim=1) @ patches.T
        return float((cost.detach() * torch.tensor(vilt(cost.detach().numpy()))).sum())

    expected = sum(distance(i, i) - distance(i, strangers[i]) for i in range(4))
    found = loss(batch, features, objective)
    assert found.sum.item() == pytest.approx(expected, abs=1e-10)
    assert found.count == 8
    total, count = found.scalars["cost"]
    assert total.item() == pytest.approx(sum(distance(i, i) for i in range(4)), abs=1e-10)
    assert count == 4
    assert not total.requires_grad


def test_words_are_neither_prompt_nor_ends_nor_padding(make_batch: MakeBatch) -> None:
    batch = make_batch([[2, 5, 6, 7, 3, 0]] * 3, lengths=[5, 2, 4], prompt=[2, 1, 3])
    assert words(batch).int().tolist() == [[0, 0, 1, 1, 0, 0], [0] * 6, [0] * 6]
    full = make_batch([[2, 5, 6, 3]])
    assert words(full).int().tolist() == [[0, 1, 1, 0]]


def test_strangers_are_the_next_eligible() -> None:
    eligible = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    assert next_other(eligible).tolist() == [2, 2, 0, 0]


def test_padding_and_unused_states_do_not_matter(make_batch: MakeBatch) -> None:
    batch, features, objective = given(make_batch)
    states = features.texts["plain"].states
    assert states is not None
    before = loss(batch, features, objective)
    (gradient,) = torch.autograd.grad(before.sum, states)
    assert torch.equal((gradient != 0).any(2), words(batch))
    longer = batch.lengthened(16, 0)
    wide = TextFeatures(longer.texts.ids, longer.texts.mask, F.pad(states, (0, 0, 0, 8), value=5.0))
    after = loss(longer, replace(features, texts={"plain": wide}), objective)
    torch.testing.assert_close(after.sum, before.sum, rtol=0, atol=1e-12)


def test_it_pulls_words_to_their_image_and_from_others(make_batch: MakeBatch) -> None:
    batch, features, objective = given(make_batch)
    leaves = [features.texts["plain"].states, features.image.tokens, *objective.parameters()]
    optimizer = torch.optim.Adam(leaves, lr=0.05)  # type: ignore[arg-type]
    values = []
    for _ in range(40):
        found = loss(batch, features, objective)
        values.append(float((found.sum / found.count).detach()))
        optimizer.zero_grad()
        found.sum.backward()
        optimizer.step()
    assert values[-1] < min(values[0], 0) - 0.3


@pytest.mark.parametrize(
    "settings",
    [{"image_ids": [5, 5, 5, 5]}, {"weight": [0.0] * 4}, {"prompt": [6] * 4}, {"describes": [False] * 4}],
)
def test_an_empty_selection_is_a_zero_that_touches_everything(make_batch: MakeBatch, settings: dict[str, Any]) -> None:
    batch, features, objective = given(make_batch, **settings)
    if "describes" in settings:
        batch = replace(batch, texts=replace(batch.texts, describes=torch.zeros(4, dtype=torch.bool)))
    found = loss(batch, features, objective)
    found.sum.backward()
    assert found.sum == 0
    assert found.count == 0
    for tensor in (features.texts["plain"].states, features.image.tokens, *objective.parameters()):
        assert tensor is not None
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_half_precision_is_summed_in_fp32(make_batch: MakeBatch) -> None:
    batch, features, objective = given(make_batch)
    exactly = loss(batch, features, objective)
    states = features.texts["plain"].states
    assert states is not None
    half = TextFeatures(batch.texts.ids, batch.texts.mask, states.bfloat16())
    tokens = ImageFeatures(features.image.tokens.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(batch, replace(features, image=tokens, texts={"plain": half}), objective.float())
    assert found.sum.dtype == torch.float32
    torch.testing.assert_close(found.sum.double(), exactly.sum, rtol=0, atol=0.1)
