"""Masked language modelling: values by hand, and that only the hidden positions count."""

from collections.abc import Callable
from dataclasses import replace
from math import exp, log
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.data.batch import Batch, Masked
from vlm.objectives.masked_language import MaskedLanguage
from vlm.objectives.objective import Taught

MakeBatch = Callable[..., Batch]
IDS = [[2, 5, 6, 3], [2, 7, 3, 0]]
UNTAUGHT = SimpleNamespace(teacher=None)


def hide(batch: Batch, positions: list[int], labels: list[int]) -> Batch:
    ids = batch.texts.ids.flatten().clone()
    ids[positions] = 4
    masked = Masked(ids.view_as(batch.texts.ids), torch.tensor(positions).long(), torch.tensor(labels).long())
    return replace(batch, masked=masked)


def test_two_hidden_tokens_by_hand(heads: Any, make_batch: MakeBatch) -> None:
    batch = hide(make_batch(IDS), [1, 5], [2, 0])
    states = torch.zeros(2, 4, 3)
    states[0, 1] = torch.tensor([1.0, 0.0, 2.0])  # label 2, found
    states[1, 1] = torch.tensor([-1.0, 1.0, 0.0])  # label 0, missed
    loss = MaskedLanguage().loss(heads, [states], UNTAUGHT, batch)  # type: ignore[arg-type]
    first = -log(exp(2) / (exp(1) + exp(0) + exp(2)))
    second = -log(exp(-1) / (exp(-1) + exp(1) + exp(0)))
    assert loss.sum.item() == pytest.approx(first + second, rel=1e-6)
    assert loss.count == MaskedLanguage().count(batch) == 2
    assert [value.item() for value in loss.scalars["accuracy"]] == [1, 2]


def test_equals_cross_entropy_over_all_positions(heads: Any) -> None:
    batch = Batch.fake(masked=True, vocab_size=20)
    assert batch.masked is not None
    states = torch.randn(*batch.texts.ids.shape, 20, dtype=torch.float64, requires_grad=True)
    labels = torch.full_like(batch.texts.ids, -100).flatten()
    labels[batch.masked.positions] = batch.texts.ids.flatten()[batch.masked.positions]
    loss = MaskedLanguage().loss(heads, [states], UNTAUGHT, batch)  # type: ignore[arg-type]
    expected = F.cross_entropy(states.flatten(0, 1), labels)
    torch.testing.assert_close(loss.sum / loss.count, expected, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum, states)
    touched = (gradient != 0).any(2).flatten().nonzero().squeeze(1)
    assert torch.equal(touched, batch.masked.positions)


@pytest.mark.parametrize(("positions", "weight"), [([], [1.0, 1.0]), ([1, 2], [0.0, 1.0])])
def test_an_empty_selection_is_a_zero_that_touches_head_and_states(
    heads: Any, make_batch: MakeBatch, positions: list[int], weight: list[float]
) -> None:
    batch = hide(make_batch(IDS, weight=weight), positions, [5] * len(positions))
    head = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 8))
    heads.masked_language_logits = head
    states = torch.randn(2, 4, 3, requires_grad=True)
    loss = MaskedLanguage().loss(heads, [states], UNTAUGHT, batch)  # type: ignore[arg-type]
    loss.sum.backward()
    assert loss.sum == 0
    assert loss.count == MaskedLanguage().count(batch) == 0
    for tensor in (states, *head.parameters()):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()


def test_a_text_without_weight_does_not_count(heads: Any, make_batch: MakeBatch) -> None:
    states = torch.randn(2, 4, 8, requires_grad=True)
    both = hide(make_batch(IDS, weight=[1.0, 0.0]), [2, 5], [6, 7])
    one = hide(make_batch(IDS), [2], [6])
    loss = MaskedLanguage().loss(heads, [states], UNTAUGHT, both)  # type: ignore[arg-type]
    alone = MaskedLanguage().loss(heads, [states], UNTAUGHT, one)  # type: ignore[arg-type]
    torch.testing.assert_close(loss.sum, alone.sum, rtol=0, atol=0)
    assert loss.count == MaskedLanguage().count(both) == 1
    assert loss.scalars["accuracy"] == alone.scalars["accuracy"]
    (gradient,) = torch.autograd.grad(loss.sum, states)
    assert (gradient[1] == 0).all()


def test_it_reads_the_masked_view_with_its_own_image(heads: Any, make_batch: MakeBatch) -> None:
    batch = hide(make_batch(IDS, image=[1, 0]), [1], [5])
    (request,) = MaskedLanguage().requests(heads, None, batch)  # type: ignore[arg-type]
    assert (request.view, request.causal) == ("masked", False)
    assert request.text_rows.tolist() == [0, 1]
    assert request.memory_rows.tolist() == [1, 0]


def test_a_batch_without_masked_texts_says_what_is_missing(heads: Any, make_batch: MakeBatch) -> None:
    batch = make_batch(IDS)
    calls: list[Callable[[], Any]] = [
        lambda: MaskedLanguage().count(batch),
        lambda: MaskedLanguage().requests(heads, None, batch),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(ValueError, match="the batch has no masked texts"):
            call()


def test_logits_in_half_precision_are_summed_in_fp32(heads: Any, make_batch: MakeBatch) -> None:
    batch = hide(make_batch(IDS), [1, 5], [2, 0])
    states: Tensor = torch.randn(2, 4, 3).bfloat16()
    loss = MaskedLanguage().loss(heads, [states], UNTAUGHT, batch)  # type: ignore[arg-type]
    expected = F.cross_entropy(states.float().flatten(0, 1)[[1, 5]], torch.tensor([2, 0]), reduction="sum")
    torch.testing.assert_close(loss.sum, expected)
    assert loss.sum.dtype == torch.float32


def test_a_teachers_predictions_soften_the_targets(heads: Any, make_batch: MakeBatch) -> None:
    batch = hide(make_batch(IDS, weight=[1.0, 1.0]), [1, 5], [2, 0])
    states = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    words = torch.randn(2, 8, dtype=torch.float64)
    features: Any = SimpleNamespace(teacher=Taught(torch.tensor(0.4, dtype=torch.float64), None, (), words))
    loss = MaskedLanguage().loss(heads, [states], features, batch)
    hidden, labels = states.flatten(0, 1)[[1, 5]], torch.tensor([2, 0])
    target = 0.4 * words.softmax(1) + 0.6 * F.one_hot(labels, 8).double()
    torch.testing.assert_close(loss.sum, -(target * hidden.log_softmax(1)).sum(), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum, states)
    expected = (hidden.softmax(1) - target).detach()
    torch.testing.assert_close(gradient.flatten(0, 1)[[1, 5]], expected, rtol=0, atol=1e-12)
    assert loss.count == 2
