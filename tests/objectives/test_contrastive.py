"""Image-text contrastive: values by hand, what counts as positive, what takes no part, numbers that stay finite."""

from collections.abc import Callable
from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.data.batch import Batch
from vlm.objectives.contrastive import Contrastive, contrastive_rows
from vlm.objectives.objective import Loss

MakeBatch = Callable[..., Batch]
Features = Callable[[Batch, Tensor, Tensor], Any]


def unit(rows: int, width: int = 8, seed: int = 0) -> Tensor:
    values = torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(values, dim=1).requires_grad_()


def texts(count: int) -> list[list[int]]:
    return [[2, 5 + i, 3] for i in range(count)]


@pytest.fixture
def evaluate(heads: Any, make_features: Features) -> Callable[[Batch, Tensor, Tensor], Loss]:
    def run(batch: Batch, image: Tensor, text: Tensor) -> Loss:
        loss = Contrastive().loss(heads, (), make_features(batch, image, text), batch)
        assert loss.count == Contrastive().count(batch)
        return loss

    return run


def test_two_pairs_by_hand(evaluate: Callable[..., Loss], make_batch: MakeBatch) -> None:
    # Products of the vectors: [[0.6, 1.0], [0.8, 0.0]]; over the temperature 0.5: [[1.2, 2.0], [1.6, 0.0]].
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    loss = evaluate(make_batch(texts(2)), image, text)
    to_text = -log(exp(1.2) / (exp(1.2) + exp(2.0))) - log(exp(0.0) / (exp(1.6) + exp(0.0)))
    to_image = -log(exp(1.2) / (exp(1.2) + exp(1.6))) - log(exp(0.0) / (exp(2.0) + exp(0.0)))
    assert loss.sum.item() == pytest.approx((to_text + to_image) / 2, rel=1e-6)
    assert loss.count == 2
    # Best columns: image 0 text 1 (wrong), image 1 text 0 (wrong), text 0 image 1 (wrong), text 1 image 0 (wrong).
    assert [value.item() for value in loss.scalars["accuracy"]] == [0.0, 2]


def test_captions_of_one_image_are_positives_by_hand(evaluate: Callable[..., Loss], make_batch: MakeBatch) -> None:
    # Texts 0 and 1 describe image 0, text 2 image 1. One row and one column for each text on both sides, so image 0 stands there twice.
    batch = make_batch(texts(3), image=[0, 0, 1])
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    loss = evaluate(batch, image, text)
    # Image 0 to the texts: 2.0, 1.2, 0.0, of which the first two are right; image 1: 0.0, 1.6, 2.0, of which the last.
    first, second = exp(2.0) + exp(1.2) + exp(0.0), exp(0.0) + exp(1.6) + exp(2.0)
    image_0 = -(log(exp(2.0) / first) + log(exp(1.2) / first)) / 2
    to_text = 2 * image_0 - log(exp(2.0) / second)
    # Text 0 to the images 0, 0, 1: 2.0, 2.0, 0.0; text 1: 1.2, 1.2, 1.6; text 2: 0.0, 0.0, 2.0.
    to_image = -log(exp(2.0) / (2 * exp(2.0) + exp(0.0))) - log(exp(1.2) / (2 * exp(1.2) + exp(1.6)))
    to_image -= log(exp(2.0) / (2 * exp(0.0) + exp(2.0)))
    assert loss.sum.item() == pytest.approx((to_text + to_image) / 2, rel=1e-6)
    # Only text 1 takes image 1 for its own.
    assert [value.item() for value in loss.scalars["accuracy"]] == [2.5, 3]


def test_equals_cross_entropy_on_distinct_images(evaluate: Callable[..., Loss], make_batch: MakeBatch) -> None:
    image, text = unit(6), unit(6, seed=1)
    loss = evaluate(make_batch(texts(6)), image, text)
    logits, own = image @ text.T / 0.5, torch.arange(6)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(loss.sum / loss.count, expected, rtol=0, atol=1e-12)


def test_equal_images_in_two_slots_are_positives_of_each_other(
    evaluate: Callable[..., Loss], make_batch: MakeBatch
) -> None:
    image, text = unit(3)[torch.tensor([0, 1, 0])], unit(3, seed=1)
    two_slots = evaluate(make_batch(texts(3), image_ids=[7, 8, 7]), image, text)
    one_slot = evaluate(make_batch([[2, 5, 3], [2, 7, 3], [2, 6, 3]], image=[0, 0, 1]), image[:2], text[[0, 2, 1]])
    torch.testing.assert_close(two_slots.sum, one_slot.sum, rtol=0, atol=1e-12)


@pytest.mark.parametrize("absent", [{"weight": [1.0, 1.0, 0.0, 1.0]}, {"describes": [True, True, False, True]}])
def test_a_slot_without_weight_and_a_question_take_no_part(
    evaluate: Callable[..., Loss], make_batch: MakeBatch, absent: dict[str, list[Any]]
) -> None:
    # A bad sample's slot holds the preceding good sample: equal image, equal text, weight 0.
    image, text = (unit(4).detach()[[0, 1, 1, 3]].requires_grad_() for _ in range(2))
    with_slot = evaluate(make_batch(texts(4), image_ids=[1, 2, 2, 3], **absent), image, text)
    kept = torch.tensor([0, 1, 3])
    without = evaluate(make_batch(texts(3)), image[kept], text[kept])
    torch.testing.assert_close(with_slot.sum, without.sum, rtol=0, atol=1e-12)
    assert with_slot.count == without.count == 3
    assert with_slot.scalars["accuracy"] == without.scalars["accuracy"]
    with_gradients = torch.autograd.grad(with_slot.sum, [image, text])
    for gradient, expected in zip(with_gradients, torch.autograd.grad(without.sum, [image, text]), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
        assert (gradient[2] == 0).all()


def test_a_batch_of_bad_samples_gives_zero_and_zero_gradients(
    evaluate: Callable[..., Loss], make_batch: MakeBatch
) -> None:
    image, text = unit(3), unit(3, seed=1)
    loss = evaluate(make_batch(texts(3), weight=[0.0, 0.0, 0.0]), image, text)
    assert loss.sum == 0
    assert loss.count == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss.sum, [image, text]))


def test_the_order_of_the_batch_does_not_matter(evaluate: Callable[..., Loss], make_batch: MakeBatch) -> None:
    image, text, order = unit(5), unit(5, seed=1), torch.tensor([3, 0, 4, 2, 1])
    ids = torch.tensor([1, 2, 1, 3, 4])
    straight = evaluate(make_batch(texts(5), image_ids=ids.tolist()), image, text)
    mixed = evaluate(make_batch(texts(5), image_ids=ids[order].tolist()), image[order], text[order])
    torch.testing.assert_close(straight.sum, mixed.sum, rtol=0, atol=1e-12)


def test_the_smallest_temperature_gives_finite_gradients(
    evaluate: Callable[..., Loss], make_batch: MakeBatch, heads: Any
) -> None:
    heads.temperature = torch.tensor(0.001, requires_grad=True)
    image = F.normalize(torch.eye(4), dim=1).requires_grad_()
    text = (-torch.eye(4)).requires_grad_()  # every pair as wrong as can be: logits of -1000 and 0
    loss = evaluate(make_batch(texts(4)), image, text)
    loss.sum.backward()
    assert loss.sum.item() == pytest.approx(4 * (1000 + log(3)), rel=1e-5)
    for tensor in (image, text, heads.temperature):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_autocast_leaves_it_in_fp32(evaluate: Callable[..., Loss], make_batch: MakeBatch) -> None:
    image, text = unit(6).float(), unit(6, seed=1).float()
    batch = make_batch(texts(6))
    with torch.autocast("cpu", torch.bfloat16):
        loss = evaluate(batch, image, text)
    assert loss.sum.dtype == torch.float32
    torch.testing.assert_close(loss.sum, evaluate(batch, image, text).sum, rtol=0, atol=0)


def test_it_asks_for_no_pass(heads: Any, make_batch: MakeBatch, make_features: Features) -> None:
    batch = make_batch(texts(2))
    assert list(Contrastive().requests(heads, make_features(batch, unit(2), unit(2)), batch)) == []


def test_the_gradient_of_distilled_rows_is_softmax_minus_target() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, dtype=torch.float64, generator=generator).requires_grad_()
    soft = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    ids, key_ids = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3, 9, 1, 2])  # the last one is absent
    valid = torch.tensor([True] * 5 + [False])
    rows = contrastive_rows(logits, ids, key_ids, valid, soft, torch.tensor(0.4, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(rows.loss.sum(), logits)
    hard = torch.zeros(3, 6, dtype=torch.float64)
    hard[0, [0, 4]], hard[1, 1], hard[2, 2] = 0.5, 1.0, 1.0
    target = 0.6 * hard
    target[:, :5] += 0.4 * soft[:, :5].softmax(1)
    expected = F.pad(logits[:, :5].softmax(1), (0, 1)) - target
    torch.testing.assert_close(gradient, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.loss, -(target[:, :5] * logits[:, :5].log_softmax(1)).sum(1), rtol=0, atol=1e-12)
