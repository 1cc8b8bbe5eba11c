"""Captioning: values by hand, what is predicted, PyTorch's label smoothing, weights."""

from collections.abc import Callable
from dataclasses import fields, replace
from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlm.data.batch import Batch, target_positions
from vlm.model.attention import CrossMemory
from vlm.model.vision_language import ImageFeatures
from vlm.objectives.captioning import Captioning, Predictions, predicted
from vlm.objectives.objective import Features

MakeBatch = Callable[..., Batch]


def test_two_tokens_by_hand(heads: Any, make_batch: MakeBatch) -> None:
    batch = make_batch([[2, 1, 0, 0]], lengths=[3])  # token 1 is predicted at position 0, token 0 at position 1
    states = torch.zeros(1, 4, 3)
    states[0, 0] = torch.tensor([0.0, 2.0, 1.0])
    states[0, 1] = torch.tensor([-1.0, 1.0, 0.0])
    loss = Captioning(label_smoothing=0.1).loss(heads, [states], None, batch)  # type: ignore[arg-type]
    first = [-log(exp(x) / (exp(0) + exp(2) + exp(1))) for x in (0, 2, 1)]
    second = [-log(exp(x) / (exp(-1) + exp(1) + exp(0))) for x in (-1, 1, 0)]
    expected = 0.9 * first[1] + 0.1 * sum(first) / 3 + 0.9 * second[0] + 0.1 * sum(second) / 3
    assert loss.sum.item() == pytest.approx(expected, rel=1e-6)
    assert loss.count == Captioning().count(batch) == 2
    assert [value.item() for value in loss.scalars["accuracy"]] == [1, 2]


def test_what_is_predicted(make_batch: MakeBatch) -> None:
    ids = [[2, 5, 6, 7, 3], [2, 5, 6, 3, 0], [2, 5, 3, 0, 0], [2, 5, 3, 0, 0]]
    texts = make_batch(ids, lengths=[5, 4, 3, 3], prompt=[1, 3, 3, 0], weight=[1, 1, 1, 0.5]).texts
    # From each position whether the next token is predicted: all words and [SEP]; [SEP] alone; nothing; never the first token.
    expected = [[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert predicted(texts.mask, texts.prompt).int().tolist() == expected
    assert target_positions(texts.mask, texts.prompt, texts.weight).tolist() == [1, 2, 3, 4, 8, 16, 17]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_equals_cross_entropy_over_all_positions(heads: Any, make_batch: MakeBatch, smoothing: float) -> None:
    ids = torch.randint(5, 20, (4, 7), generator=torch.Generator().manual_seed(0)).tolist()
    batch = make_batch(ids, lengths=[7, 5, 6, 3], prompt=[1, 3, 2, 1])
    states = torch.randn(4, 7, 20, dtype=torch.float64, requires_grad=True)
    labels = batch.texts.ids.masked_fill(~batch.texts.mask, -100)
    labels[torch.arange(7) < batch.texts.prompt[:, None]] = -100
    expected = F.cross_entropy(states[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing)
    objective = Captioning(smoothing)
    loss = objective.loss(heads, [states], None, batch)  # type: ignore[arg-type]
    torch.testing.assert_close(loss.sum / loss.count, expected, rtol=0, atol=1e-12)
    assert loss.count == objective.count(batch) == (6 + 2 + 4 + 2)
    (gradient,) = torch.autograd.grad(loss.sum, states)
    assert torch.equal((gradient != 0).any(2)[:, :-1], predicted(batch.texts.mask, batch.texts.prompt))
    assert (gradient[:, -1] == 0).all()


def test_texts_are_weighted(heads: Any, make_batch: MakeBatch) -> None:
    batch = make_batch([[2, 5, 6, 3], [2, 7, 3, 0], [2, 8, 3, 0]], lengths=[4, 3, 3], weight=[0.5, 0.25, 0.0])
    states = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)

    def token(row: int, at: int) -> torch.Tensor:
        return -states[row, at - 1].log_softmax(0)[batch.texts.ids[row, at]]

    first, second = token(0, 1) + token(0, 2) + token(0, 3), token(1, 1) + token(1, 2)
    for per, count in (("texts", 0.75), ("tokens", 3 * 0.5 + 2 * 0.25)):
        objective = Captioning(0.0, per=per)  # type: ignore[arg-type]
        loss = objective.loss(heads, [states], None, batch)  # type: ignore[arg-type]
        torch.testing.assert_close(loss.sum, 0.5 * first + 0.25 * second, rtol=0, atol=1e-12)
        assert loss.count == objective.count(batch) == count
        assert loss.scalars["accuracy"][1] == 5  # without the text of weight 0
        (gradient,) = torch.autograd.grad(loss.sum, states)
        assert (gradient[2] == 0).all()


@pytest.mark.parametrize("settings", [{"prompt": [3, 3]}, {"weight": [0.0, 0.0]}])
def test_nothing_to_predict_is_a_zero_that_touches_head_and_states(
    heads: Any, make_batch: MakeBatch, settings: dict[str, Any]
) -> None:
    batch = make_batch([[2, 5, 3], [2, 6, 3]], **settings)
    head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 8))
    heads.language_logits = head
    states = torch.randn(2, 3, 4, requires_grad=True)
    loss = Captioning().loss(heads, [states], None, batch)  # type: ignore[arg-type]
    loss.sum.backward()
    assert loss.sum == 0
    assert loss.count == Captioning().count(batch) == 0
    for tensor in (states, *head.parameters()):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()


def test_it_decodes_every_text_with_its_own_image(heads: Any, make_batch: MakeBatch) -> None:
    batch = make_batch([[2, 5, 3], [2, 6, 3], [2, 7, 3]], image=[0, 1, 1])
    (request,) = Captioning().requests(heads, None, batch)  # type: ignore[arg-type]
    assert request.causal
    assert request.text_rows.tolist() == [0, 1, 2]
    assert request.memory_rows.tolist() == [0, 1, 1]


def test_captions_and_answers_are_learned_apart(heads: Any, make_batch: MakeBatch) -> None:
    ids = [[2, 5, 3, 0], [2, 6, 7, 3], [2, 8, 3, 0]]
    mixed = make_batch(
        ids, image=[1, 0, 1], lengths=[3, 4, 3], prompt=[1, 2, 1], weight=[1, 0.5, 1], describes=[True, False, True]
    )
    mixed = replace(mixed, captions=torch.tensor([0, 2]), questions=torch.tensor([1]))
    states = torch.randn(3, 4, 9, dtype=torch.float64)
    for of, rows in (("captions", [0, 2]), ("answers", [1])):
        objective = Captioning(0.1, per="texts", of=of)  # type: ignore[arg-type]
        (request,) = objective.requests(heads, None, mixed)  # type: ignore[arg-type]
        assert request.text_rows.tolist() == rows
        assert request.memory_rows.tolist() == mixed.texts.image[rows].tolist()
        loss = objective.loss(heads, [states[rows]], None, mixed)  # type: ignore[arg-type]
        texts = mixed.texts
        alone = make_batch(
            [ids[row] for row in rows],
            lengths=texts.mask[rows].sum(1).tolist(),
            prompt=texts.prompt[rows].tolist(),
            weight=texts.weight[rows].tolist(),
        )
        expected = Captioning(0.1, per="texts").loss(heads, [states[rows]], None, alone)  # type: ignore[arg-type]
        assert loss.sum == expected.sum
        assert loss.count == objective.count(mixed) == expected.count


@pytest.mark.parametrize("of", ["captions", "answers", "all"])
def test_labels_that_are_found_before_the_step_are_those_of_the_texts(
    heads: Any, make_batch: MakeBatch, of: Any
) -> None:
    """In the loader, by `Batch.with_targets`; texts may then be lengthened and filled up."""
    batch = make_batch(
        [[2, 5, 6, 3, 0], [2, 6, 7, 8, 3], [2, 8, 3, 0, 0], [2, 9, 7, 3, 0], [2, 5, 9, 3, 0]],
        lengths=[4, 5, 3, 4, 4],
        prompt=[1, 3, 1, 2, 2],
        weight=[1, 0.5, 1, 0, 0.25],
        describes=[True, False, True, False, True],
    )
    batch = replace(batch, captions=torch.tensor([0, 2, 4]), questions=torch.tensor([1, 3]))
    batch = replace(batch, sources=[{}, {"set_weight": 0.5}, {}, {}, {"set_weight": 3.0}])
    known, objective = batch.with_targets(), Captioning(0.1, of=of)
    assert known.with_targets() is known
    assert batch.to("cpu").targets is not None  # a batch that no loader made has them before it reaches a device
    states = torch.randn(8, 12, 10, dtype=torch.float64)
    for changed in (lambda b: b, lambda b: b.lengthened(12, 0), lambda b: b.filled_up(8), lambda b: b.to("cpu")):
        found, given = changed(batch), changed(known)
        given = replace(given, texts=replace(given.texts, mask=given.texts.mask & False))  # it is not looked up again
        output = states[: len(objective._rows(found)), : found.texts.ids.shape[1]]
        one, two = (objective.predictions(heads, output, b) for b in (replace(found, targets=None), given))
        assert len(one.labels) == {"captions": 3 + 2 + 2, "answers": 2, "all": 3 + 2 + 2 + 2}[of]
        assert all(torch.equal(getattr(one, f.name), getattr(two, f.name)) for f in fields(Predictions))


def test_a_batch_without_questions_asks_for_no_answers(heads: Any, make_batch: MakeBatch) -> None:
    batch, answering = make_batch([[2, 5, 3]]), Captioning(of="answers")
    keys = torch.ones(1, requires_grad=True)
    features = Features(ImageFeatures(keys), {}, {"decoder": CrossMemory([keys], [keys])})
    assert answering.requests(heads, features, batch) == []
    loss = answering.loss(heads, [], features, batch)
    loss.sum.backward()
    assert loss.sum == loss.count == answering.count(batch) == 0
    assert keys.grad == 0
    (request,) = Captioning(of="captions").requests(heads, features, batch)
    assert request.text_rows.tolist() == [0]


def test_logits_in_half_precision_are_summed_in_fp32(heads: Any, make_batch: MakeBatch) -> None:
    states = torch.randn(1, 3, 9).bfloat16()
    loss = Captioning(0.1).loss(heads, [states], None, make_batch([[2, 5, 3]]))  # type: ignore[arg-type]
    expected = F.cross_entropy(states[0, :-1].float(), torch.tensor([5, 3]), reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(loss.sum, expected)
    assert loss.sum.dtype == torch.float32
