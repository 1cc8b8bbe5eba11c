"""Image-text matching: values by hand, which negatives are drawn and how often, numbers that stay finite, no waiting for the device, learning."""

from collections.abc import Callable
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from vlm.config import ObjectivesConfig
from vlm.data.batch import Batch
from vlm.model.vision_language import ImageFeatures, TextFeatures, VisionLanguageModel
from vlm.objectives import matching
from vlm.objectives.matching import Matching, eligibility, sample_negatives
from vlm.objectives.objective import Features as SharedFeatures
from vlm.tasks.pretraining import Pretraining

MakeBatch = Callable[..., Batch]
Features = Callable[[Batch, Tensor, Tensor], Any]


def texts(count: int) -> list[list[int]]:
    return [[2, 5 + i, 3] for i in range(count)]


def draw(heads: Any, features: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the texts, negative images and negative texts, with the positive pass checked."""
    positive, images, negatives = Matching().requests(heads, features, batch)
    rows = torch.arange(len(batch.texts.ids))
    assert torch.equal(positive.text_rows, rows)
    assert torch.equal(positive.memory_rows, batch.texts.image)
    assert torch.equal(images.text_rows, rows)
    assert torch.equal(negatives.memory_rows, batch.texts.image)
    assert {p.view for p in (positive, images, negatives)} == {"plain"}
    assert not any(p.causal for p in (positive, images, negatives))
    return rows, images.memory_rows, negatives.text_rows


def test_two_pairs_by_hand(heads: Any, make_batch: MakeBatch) -> None:
    batch = make_batch(texts(2))
    # (no match, match) of the two positives, of the two negative images, of the two negative texts.
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.5, 0.0], [0.0, 0.0], [1.0, -1.0], [-1.0, 1.0]])
    outputs = [part[:, None].expand(-1, 3, -1) for part in logits.split(2)]
    loss = Matching().loss(heads, outputs, None, batch)  # type: ignore[arg-type]
    positives = -log(exp(1) / (1 + exp(1))) - log(1 / (exp(2) + 1))
    negatives = -log(exp(0.5) / (exp(0.5) + 1)) - log(0.5) - log(exp(1) / (exp(1) + exp(-1)))
    negatives -= log(exp(-1) / (exp(-1) + exp(1)))
    assert loss.sum.item() == pytest.approx(positives + negatives, rel=1e-6)
    assert loss.count == Matching().count(batch) == 6
    # Right: the first positive, the first negative image, the first negative text; the tie falls to "no match", which is right too.
    assert [value.item() for value in loss.scalars["accuracy"]] == [4, 6]


def test_a_negative_is_never_of_the_same_image(heads: Any, make_batch: MakeBatch, make_features: Features) -> None:
    image_of_text, ids = [0, 0, 1, 2, 3], [11, 12, 11, 13]  # image 2 is image 0 again, in another slot
    batch = make_batch(texts(5), image=image_of_text, image_ids=ids)
    features = make_features(batch, torch.eye(4), torch.eye(4)[image_of_text])  # the positive is always the most alike
    whose = batch.image_ids
    torch.manual_seed(0)
    for _ in range(200):
        rows, images, negatives = draw(heads, features, batch)
        assert (whose[images] != whose[batch.texts.image[rows]]).all()
        assert (whose[batch.texts.image[negatives]] != whose[batch.texts.image[rows]]).all()


def test_of_two_it_is_always_the_other(heads: Any, make_batch: MakeBatch, make_features: Features) -> None:
    batch = make_batch(texts(2))
    features = make_features(batch, torch.eye(2), torch.eye(2))
    torch.manual_seed(0)
    for _ in range(50):
        _, images, negatives = draw(heads, features, batch)
        assert images.tolist() == negatives.tolist() == [1, 0]


def test_negatives_are_those_most_alike(heads: Any, make_batch: MakeBatch, make_features: Features) -> None:
    # Products of images (rows) and texts: image 0 is most like text 2, but text 0 most like image 1, and so on.
    products = torch.tensor([[0.0, 0.0, 50.0], [50.0, 0.0, 0.0], [0.0, 50.0, 0.0]])
    batch = make_batch(texts(3))
    _, images, negatives = draw(heads, make_features(batch, torch.eye(3), products.T), batch)
    assert images.tolist() == [1, 2, 0]
    assert negatives.tolist() == [2, 0, 1]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The similarities that negatives are drawn by, of texts and then of images, as they are asked for."""
    seen: list[Tensor] = []

    def note(similarity: Tensor, eligible: Tensor, itself: Tensor) -> Tensor:
        seen.append(similarity)
        return sample_negatives(similarity, eligible, itself)

    monkeypatch.setattr(matching, "sample_negatives", note)
    return seen


@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_negatives_are_drawn_by_similarity_over_temperature(
    heads: Any, make_batch: MakeBatch, make_features: Features, compared: list[Tensor], temperature: float
) -> None:
    batch = make_batch(texts(4), image=[0, 2, 1, 2])
    image, text = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    heads.temperature = torch.tensor(temperature)
    Matching().requests(heads, make_features(batch, image, text), batch)
    products = torch.stack([torch.stack([image[i] @ t for t in text]) for i in (0, 2, 1, 2)])
    for similarity, expected in zip(compared, (products, products.T), strict=True):
        torch.testing.assert_close(similarity, expected / heads.temperature, rtol=0, atol=1e-9)


def test_under_autocast_negatives_are_drawn_by_the_same_similarities(
    heads: Any, make_batch: MakeBatch, make_features: Features, compared: list[Tensor]
) -> None:
    batch = make_batch(texts(4))
    features = make_features(batch, torch.randn(4, 5), torch.randn(4, 5))
    Matching().requests(heads, features, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16  # else nothing was to be shown
        Matching().requests(heads, features, batch)
    assert len(compared) == 4
    for plain, cast in zip(compared[:2], compared[2:], strict=True):
        assert cast.dtype == torch.float32
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("absent", [{"weight": [1.0, 1.0, 0.0, 1.0]}, {"describes": [True, True, False, True]}])
def test_a_slot_without_weight_and_a_question_are_never_negatives_and_never_count(
    heads: Any, make_batch: MakeBatch, make_features: Features, absent: dict[str, list[Any]]
) -> None:
    batch = make_batch(texts(4), **absent)
    features = make_features(batch, torch.ones(4, 2), torch.ones(4, 2))
    torch.manual_seed(0)
    for _ in range(100):
        _, images, negatives = draw(heads, features, batch)
        assert 2 not in images[[0, 1, 3]]
        assert 2 not in negatives[[0, 1, 3]]
    outputs = [torch.randn(4, 3, 2, requires_grad=True) for _ in range(3)]
    loss = Matching().loss(heads, outputs, features, batch)
    assert loss.count == Matching().count(batch) == 9
    for gradient in torch.autograd.grad(loss.sum, outputs):
        assert (gradient[2] == 0).all()
        assert (gradient[[0, 1, 3], 0] != 0).all()


@pytest.mark.parametrize(
    "settings", [{}, {"image_ids": [5, 5, 5]}, {"weight": [1.0, 0.0, 0.0]}, {"weight": [0.0, 0.0, 0.0]}]
)
def test_without_negatives_it_is_a_zero_that_touches_the_head(
    heads: Any, make_batch: MakeBatch, make_features: Features, settings: dict[str, Any]
) -> None:
    count = 3 if settings else 1
    batch = make_batch(texts(count), **settings)
    head = nn.Linear(4, 2)
    heads.matching_logits = lambda states: head(states[:, 0])
    features = make_features(batch, torch.ones(count, 2), torch.ones(count, 2))
    draw(heads, features, batch)
    outputs = [torch.randn(count, 3, 4, requires_grad=True) for _ in range(3)]
    loss = Matching().loss(heads, outputs, features, batch)
    loss.sum.backward()
    assert loss.sum == 0
    assert loss.count == Matching().count(batch) == 0
    for tensor in (head.weight, head.bias, *outputs):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()


def test_negatives_follow_the_softmax() -> None:
    similarity = torch.tensor(
        [[9.0, 1.0, 0.0, -1.0], [0.5, 9.0, 0.5, -2.0], [2.0, 0.0, 9.0, 1.0], [0.0, 0.0, 0.0, 9.0]]
    )
    eligible = ~torch.eye(4, dtype=torch.bool)
    eligible[3, 0] = False  # the same image again
    draws, counts = 4000, torch.zeros(4, 4)
    torch.manual_seed(0)
    for _ in range(draws):
        counts[torch.arange(4), sample_negatives(similarity, eligible, torch.arange(4))] += 1
    expected = draws * torch.softmax(similarity.masked_fill(~eligible, float("-inf")), dim=1)
    assert (counts[~eligible] == 0).all()
    chi = ((counts - expected)[eligible] ** 2 / expected[eligible]).sum().item()
    assert chi < 24.3  # the 99.9th percentile for 7 degrees of freedom: 3 rows with 3 choices, one with 2


def test_half_precision_does_not_blunt_the_draw() -> None:
    torch.manual_seed(0)
    flat, others = torch.full((4, 4), 4e4).bfloat16(), ~torch.eye(4, dtype=torch.bool)
    drawn = {
        (row, int(column))
        for _ in range(100)
        for row, column in enumerate(sample_negatives(flat, others, torch.arange(4)))
    }
    assert drawn == {(row, column) for row in range(4) for column in range(4) if row != column}


@pytest.mark.parametrize("scale", [0.0, 1e4, float("nan"), float("inf")])
def test_any_similarity_gives_an_eligible_column(scale: float) -> None:
    torch.manual_seed(0)
    similarity = torch.randn(16, 16).sign() * scale
    similarity = similarity.bfloat16() if scale == 1e4 else similarity
    eligible = torch.rand(16, 16) < 0.3
    eligible[0] = False
    for _ in range(50):
        column = sample_negatives(similarity, eligible, torch.arange(16))
        assert eligible[torch.arange(16), column][eligible.any(1)].all()
        assert (column == torch.arange(16))[~eligible.any(1)].all()


def test_large_logits_give_a_finite_loss(heads: Any, make_batch: MakeBatch) -> None:
    outputs = [torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]]).bfloat16().requires_grad_() for _ in range(3)]
    loss = Matching().loss(heads, outputs, None, make_batch(texts(2)))  # type: ignore[arg-type]
    assert loss.sum.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss.sum, outputs))


def test_logits_in_half_precision_are_summed_in_fp32(heads: Any, make_batch: MakeBatch) -> None:
    batch, outputs = make_batch(texts(4)), [torch.randn(4, 3, 2).bfloat16() for _ in range(3)]
    loss = Matching().loss(heads, outputs, None, batch)  # type: ignore[arg-type]
    expected = Matching().loss(heads, [states.float() for states in outputs], None, batch)  # type: ignore[arg-type]
    assert loss.sum.dtype == torch.float32
    assert torch.equal(loss.sum, expected.sum)


def test_nothing_waits_for_the_device(heads: Any, make_batch: MakeBatch, make_features: Features) -> None:
    batch = make_batch(texts(4), weight=[1.0, 0.0, 1.0, 1.0])
    features = make_features(batch, torch.randn(4, 2), torch.randn(4, 2))
    outputs = [torch.randn(4, 3, 2) for _ in range(3)]
    with profile() as profiled:
        Matching().requests(heads, features, batch)
        Matching().count(batch)
        Matching().loss(heads, outputs, features, batch)
    used = {event.name for event in profiled.events()}
    assert "aten::argmax" in used  # the profile sees what is done
    waiting = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
    assert not used & waiting


def test_texts_of_equal_images_and_bad_slots_are_not_eligible(make_batch: MakeBatch) -> None:
    usable, eligible = eligibility(make_batch(texts(3), image_ids=[4, 4, 6], weight=[1.0, 1.0, 0.0]))
    assert usable.tolist() == [True, True, False]
    assert eligible.tolist() == [[False] * 3, [False] * 3, [True, True, False]]


def test_a_row_without_negatives_points_at_itself_among_the_columns_of_all_ranks() -> None:
    eligible = torch.zeros(2, 6, dtype=torch.bool)
    eligible[1, 5] = True
    assert sample_negatives(torch.randn(2, 6), eligible, torch.tensor([2, 3])).tolist() == [2, 5]


def test_a_new_model_learns_pairs_by_heart_from_hard_negatives(
    tiny_config: Callable[..., Any], make_batch: MakeBatch
) -> None:
    """Of 64 images of four things each; the embeddings know which things there are, so the negatives are those that share most of them.

    Guessing gives 0.6365, the entropy of one right pair in three. With BERT's 0.02 for all weights it still stands at 0.63 then.
    """
    torch.manual_seed(0)
    model = VisionLanguageModel(tiny_config(text={"dim": 64, "layers": 2, "cross_attention": (0, 1)}))
    things = torch.rand(64, 12).argsort(1)[:, :4]
    tokens = torch.randn(12, model.image_encoder.dim)[things]
    batch = make_batch(torch.nn.functional.pad(things + 4, (1, 1), value=2).tolist())
    alike = nn.functional.normalize(tokens.mean(1), dim=1)
    text = TextFeatures(batch.texts.ids, batch.texts.mask, None, alike)
    learning = [*model.text.parameters(), *model.fusion_memory.parameters(), *model.matching_head.parameters()]  # type: ignore[union-attr]
    optimizer, losses = torch.optim.AdamW(learning, lr=1e-3, betas=(0.9, 0.98)), []
    for _ in range(50):
        memory = model.memory(tokens, None, "fusion")
        features = SharedFeatures(ImageFeatures(tokens, alike), {"plain": text}, {"fusion": memory})
        passes = Matching().requests(model, features, batch)
        states = [model.fuse(text.select(p.text_rows), memory.select(p.memory_rows)) for p in passes]
        found = Matching().loss(model, states, features, batch)
        loss = found.sum / found.count
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5


def test_negatives_are_drawn_evenly_at_first_and_become_hard(
    heads: Any, make_batch: MakeBatch, make_features: Features
) -> None:
    objective, batch = Matching(easy=2.0), make_batch(texts(4))
    likeness = torch.eye(4) + 10 * torch.eye(4).roll(1, 0)  # each image has one text that is far more alike than others
    features = make_features(batch, likeness, torch.eye(4))
    objective.prepare(epoch_steps=5)

    def shares() -> Tensor:
        counts = torch.zeros(4, 4)
        for _ in range(600):
            _, images, negatives = objective.requests(heads, features, batch)
            counts[torch.arange(4), images.memory_rows] += 1
            counts[torch.arange(4), negatives.text_rows] += 1
        return counts / counts.sum(1, keepdim=True)

    torch.manual_seed(0)
    others = ~torch.eye(4, dtype=torch.bool)
    assert shares()[others].tolist() == pytest.approx([1 / 3] * 12, abs=0.06)  # 4.4 standard deviations
    hardness = []
    for _ in range(25):
        hardness.append(float(objective.hardness))
        objective.after_step(torch.tensor(True))
        objective.after_step(torch.tensor(False))  # skipped: no step
    assert hardness == pytest.approx([0.0] * 10 + [i / 10 for i in range(10)] + [1.0] * 5)
    assert shares().max(1).values.min() > 0.49  # of the two kinds of negatives one is as good as always the same
    assert Matching().hardness == 1.0
    assert Matching().state_dict() == {}


def test_where_the_curriculum_stands_survives_a_restart(tiny_model: Callable[..., VisionLanguageModel]) -> None:
    config = ObjectivesConfig(easy_negatives=1.5)
    task, resumed = Pretraining(tiny_model(), config), Pretraining(tiny_model(), config)
    for t in (task, resumed):
        t.prepare(4)
    for _ in range(8):
        task.after_step()
    resumed.load_training_state(task.training_state())
    assert float(resumed.objectives["matching"].hardness) == pytest.approx(8 / 6 - 1)  # type: ignore[attr-defined]
