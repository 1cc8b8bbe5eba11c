"""Pretraining: every objective is learnt, features are computed once and shared, micro-batches add up."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import profile

from vlm.config import ModelConfig, ObjectivesConfig
from vlm.data.batch import Batch
from vlm.data.samples import CaptionEncoder, JointEncoder, QuestionEncoder
from vlm.errors import ConfigError
from vlm.model import lengths
from vlm.model.vision_language import VisionLanguageModel
from vlm.tasks.pretraining import Pretraining, build_objectives

ALL = ObjectivesConfig(captioning=1.0, label_smoothing=0.0)
LATE: dict[str, Any] = {"fusion": "late", "text": {"cross_attention": (2, 3)}}


@pytest.mark.parametrize("late", [False, True])
def test_it_learns_a_few_scenes_by_heart(
    scenes: Any, learn: Callable[..., list[float]], tiny_config: Callable[..., ModelConfig], late: bool
) -> None:
    text: dict[str, Any] = {"vocab_size": scenes.tokenizer.vocab_size}
    text |= {"cross_attention": (2, 3)} if late else {}
    torch.manual_seed(0)
    config = tiny_config(text=text, image="test_resnet", fusion="late" if late else "full")
    task = Pretraining(VisionLanguageModel(config), ALL)
    encode = CaptionEncoder(scenes.tokenizer, scenes.transform, True, masking_probability=0.3)
    batch = scenes.batch(encode)
    totals = learn(task, batch, 150)
    assert totals[-1] < 0.2 * totals[0]
    with torch.no_grad():
        losses = task(batch)
    for name, loss in losses.items():
        right, count = loss.scalars["accuracy"]
        assert right >= 0.9 * count > 0, name  # always saying "no match" would be right for two thirds
    scores = task.evaluate(task.predict(scenes.batch(replace(encode, training=False, texts_per_image="all"))))
    assert scores["TR_R@1"] == scores["IR_R@1"] == scores["mean_R@1"] == 100
    assert scores["images"] == 4


@pytest.mark.parametrize(("settings", "text"), [({}, 3), (LATE, 4)])
def test_everything_is_computed_once_and_shared(
    tiny_model: Callable[..., VisionLanguageModel], batch: Batch, settings: dict[str, Any], text: int
) -> None:
    model = tiny_model(**settings)
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda *_: calls.update([name])

    for name, module in model.named_children():
        module.register_forward_hook(count(name))
    losses = Pretraining(model, ALL)(batch)
    assert list(losses) == ["contrastive", "matching", "masked_language", "captioning"]
    # The text runs once for the plain view, once for all fused passes, once for decoding; late fusion encodes the masked view as well.
    assert calls["text"] == text
    assert {name: n for name, n in calls.items() if name != "text"} == {
        "image_encoder": 1,
        "fusion_memory": 1,
        "image_projection": 1,
        "text_projection": text - 2,
        "matching_head": 1,
        "masked_language_head": 1,
        "language_head": 1,
    }


@pytest.mark.parametrize("settings", [{}, LATE])
def test_one_objective_gives_alone_what_it_gives_beside_others(
    tiny_model: Callable[..., VisionLanguageModel], batch: Batch, settings: dict[str, Any]
) -> None:
    model = tiny_model(**settings)
    torch.manual_seed(0)
    together = Pretraining(model, ALL)(batch)
    off = ObjectivesConfig(contrastive=0.0, matching=0.0, masked_language=0.0, label_smoothing=0.0)
    for name, expected in together.items():
        task = Pretraining(model, replace(off, **{name: 1.0}))
        torch.manual_seed(0)  # matching draws
        found = task(batch)
        assert list(found) == [name]
        torch.testing.assert_close(found[name].sum, expected.sum, rtol=0, atol=1e-10)
        assert found[name].count == expected.count == task.counts(batch)[name]


def test_nothing_waits_for_the_device(
    scenes: Any, tiny_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of every objective but the rewards, which are counted on the processor, of a batch as the loader makes it."""
    monkeypatch.setattr(lengths, "reads_lengths", lambda _: False)  # as on a GPU
    settings = ObjectivesConfig(
        masked_image=1.0, word_patch=0.1, captioning=1.0, answering=1.0, momentum=0.9, queue=6, easy_negatives=1.0
    )
    caption = CaptionEncoder(scenes.tokenizer, scenes.transform, True, masking_probability=0.3)
    question = QuestionEncoder(scenes.tokenizer, scenes.transform, True, form="prompted")
    batch = replace(scenes.batch(JointEncoder(caption, question)), hidden=torch.tensor([[0, 3]] * 4))
    model = VisionLanguageModel(tiny_config(text={"vocab_size": scenes.tokenizer.vocab_size}))
    task = Pretraining(model, settings).train()
    task.prepare(2)
    with profile() as profiled:
        task.counts(batch)
        losses = task(batch)
        sum(loss.sum for loss in losses.values()).backward()  # type: ignore[union-attr]
        task.after_step(torch.tensor(True))
    assert len(losses) == 7
    assert all(loss.count > 0 for loss in losses.values())
    used = {event.name for event in profiled.events()}
    assert {"aten::_foreach_lerp_", "aten::scatter_reduce", "aten::argmax"} <= used  # the profile sees what is done
    waiting = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
    assert not used & waiting


def test_the_temperature_is_clamped_before_the_teacher_averages_it(
    tiny_model: Callable[..., VisionLanguageModel],
) -> None:
    task = Pretraining(tiny_model(), ObjectivesConfig(momentum=0.995))
    assert task.teacher is not None
    before = task.teacher.model.temperature.item()
    with torch.no_grad():
        task.model.temperature.fill_(0.9)
    task.after_step()
    assert task.model.temperature == 0.5
    assert task.teacher.model.temperature.item() == pytest.approx(0.995 * before + 0.005 * 0.5, rel=1e-12)


def test_micro_batches_add_up(tiny_model: Callable[..., VisionLanguageModel], batch: Batch) -> None:
    task = Pretraining(tiny_model(), replace(ALL, contrastive=0.0, matching=0.0))
    whole = task(batch)
    assert batch.masked is not None
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        texts, length = batch.texts, batch.texts.ids.shape[1]
        own = (batch.masked.positions >= rows.start * length) & (batch.masked.positions < rows.stop * length)
        part = replace(
            batch,
            images=batch.images[rows],
            texts=replace(
                texts,
                ids=texts.ids[rows],
                mask=texts.mask[rows],
                image=torch.arange(2),
                prompt=texts.prompt[rows],
                weight=texts.weight[rows],
            ),
            masked=replace(
                batch.masked,
                ids=batch.masked.ids[rows],
                positions=batch.masked.positions[own] - rows.start * length,
                labels=batch.masked.labels[own],
            ),
        )
        halves.append(task(part))
    for name, loss in whole.items():
        assert task.objectives[name].scope == "micro"
        torch.testing.assert_close(sum(half[name].sum for half in halves), loss.sum, rtol=0, atol=1e-10)
        assert sum(half[name].count for half in halves) == loss.count


def test_embeddings_of_several_texts_an_image(tiny_model: Callable[..., VisionLanguageModel]) -> None:
    task = Pretraining(tiny_model(), ObjectivesConfig())
    batch = Batch.fake(3, texts_per_image=2)
    batch = replace(batch, texts=replace(batch.texts, image=torch.tensor([2, 0, 1, 1, 0, 2])))
    records = task.predict(batch)
    assert [r["key"] for r in records] == batch.keys
    expected = task.model.encode_text(batch.texts.ids, batch.texts.mask).embedding
    assert expected is not None
    for row, record in enumerate(records):
        own = (batch.texts.image == row).numpy()
        np.testing.assert_allclose(record["texts"], expected.detach().numpy()[own], atol=1e-12)
    # Texts made to lie on their images: all found; on each other's: none at once.
    perfect = [{**r, "image": np.eye(3)[i], "texts": np.eye(3)[[i, i]]} for i, r in enumerate(records)]
    assert task.evaluate(perfect)["mean_R@1"] == 100
    wrong = [{**r, "texts": np.eye(3)[[(i + 1) % 3] * 2]} for i, r in enumerate(perfect)]
    assert task.evaluate(wrong)["mean_R@1"] == 0
    assert task.intervals(perfect) == {"TR_R@1": (100, 100), "IR_R@1": (100, 100)}


def test_objectives_and_their_weights(tiny_model: Callable[..., VisionLanguageModel]) -> None:
    objectives, weights = build_objectives(
        tiny_model(), ObjectivesConfig(matching=0.0, masked_language=0.5, captioning=2.0)
    )
    assert list(objectives) == ["contrastive", "masked_language", "captioning"]
    assert weights == {"contrastive": 1.0, "masked_language": 0.5, "captioning": 2.0}
    with pytest.raises(ConfigError, match="all weights are 0"):
        build_objectives(tiny_model(), ObjectivesConfig(contrastive=0.0, matching=0.0, masked_language=0.0))
