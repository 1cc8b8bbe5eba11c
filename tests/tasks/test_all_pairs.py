"""Without a contrastive objective nothing teaches the embeddings: evaluation, which chooses the best checkpoint, looks at all pairs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vlm.config import ModelConfig, ObjectivesConfig, RetrievalConfig
from vlm.data.batch import Batch
from vlm.data.samples import CaptionEncoder
from vlm.metrics.retrieval import retrieval_scores
from vlm.model.vision_language import VisionLanguageModel
from vlm.tasks.pretraining import Pretraining
from vlm.tasks.reranking import By, join_texts, rerank

MakeModel = Callable[..., VisionLanguageModel]
METER = ObjectivesConfig(contrastive=0.0)  # masked language and matching
LATE: dict[str, Any] = {"fusion": "late", "text": {"cross_attention": (2, 3)}}


@pytest.fixture
def several() -> Batch:
    """Six images with two texts each, in no order."""
    batch = Batch.fake(6, texts_per_image=2)
    image = torch.tensor([2, 0, 1, 5, 4, 3, 1, 0, 2, 5, 3, 4])
    return replace(batch, texts=replace(batch.texts, image=image))


@pytest.mark.parametrize("settings", [{}, LATE], ids=["full", "late"])
@torch.no_grad()
def test_pairs_are_ranked_by_the_matching_head_alone(
    tiny_model: MakeModel, several: Batch, settings: dict[str, Any]
) -> None:
    model = tiny_model(**settings)
    task = Pretraining(model, METER).eval()
    records = task.predict(several)
    found = task.evaluate(records)
    order = torch.cat([(several.texts.image == row).nonzero()[:, 0] for row in range(6)])
    ids, mask = several.texts.ids[order], several.texts.mask[order]
    tokens = model.encode_image(several.images).tokens
    odds = []
    for image in tokens:
        states = model.fuse(model.text_view(ids, mask), model.memory(image[None].expand(12, -1, -1), None, "fusion"))
        odds.append(model.matching_logits(states).diff()[:, 0].numpy())
    expected = retrieval_scores(np.stack(odds), np.arange(6), np.arange(6).repeat(2))
    assert found == {**expected.named(), "images": 6}
    assert set(task.intervals(records)) == {"TR_R@1", "IR_R@1"}


@torch.no_grad()
def test_the_projections_have_no_say(tiny_model: MakeModel, several: Batch) -> None:
    """Their weights, and the temperature, are what they were at the start: they may not move the score."""
    model = tiny_model()
    task = Pretraining(model, METER).eval()
    before = task._retrieve(task.predict(several)).final
    for seed in range(5):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "projection" in name:
                parameter.normal_()
        model.temperature.fill_(0.001)
        after = task._retrieve(task.predict(several)).final
        np.testing.assert_array_equal(after.image_ranks, before.image_ranks)
        np.testing.assert_array_equal(after.text_ranks, before.text_ranks)
    bare = tiny_model(heads=("matching", "masked_language"))
    assert Pretraining(bare, METER).eval().predict(several)[0].keys() == {"key", "image_id", "tokens", "ids"}


@pytest.mark.parametrize("objective", ["captioning", "self_critical"])
def test_captioners_are_ranked_by_what_they_learn_where_that_is_asked_for(
    tiny_model: MakeModel, several: Batch, objective: str
) -> None:
    off = ObjectivesConfig(contrastive=0.0, matching=0.0, **{objective: 1.0})
    task = Pretraining(tiny_model(), off, retrieval=RetrievalConfig(by="captioning")).eval()
    records = task.predict(several)
    tokens = torch.from_numpy(np.stack([record["tokens"] for record in records]))
    texts = join_texts([text for record in records for text in record["ids"]], 0, task.model.device)
    scores = rerank(task.model, tokens, texts, np.zeros((6, 12)), 12, "captioning")
    expected = retrieval_scores(scores, np.arange(6), np.arange(6).repeat(2))
    assert task.evaluate(records) == {**expected.named(), "images": 6}


@pytest.mark.parametrize(
    ("changes", "by"),
    [({"contrastive": 1.0}, "matching"), ({"matching": 0.0}, "matching"), ({}, "captioning")],
    ids=["embeddings are learned", "matching is not", "captioning is not"],
)
def test_embeddings_are_compared_where_they_are_learned_or_nothing_else_is(
    tiny_model: MakeModel, several: Batch, changes: dict[str, float], by: By
) -> None:
    task = Pretraining(tiny_model(), replace(METER, **changes), retrieval=RetrievalConfig(by=by)).eval()
    assert task.predict(several)[0].keys() == {"key", "image_id", "image", "texts"}


def test_what_matching_learned_is_what_is_scored(
    scenes: Any, learn: Callable[..., list[float]], tiny_config: Callable[..., ModelConfig]
) -> None:
    torch.manual_seed(0)
    model = VisionLanguageModel(tiny_config(text={"vocab_size": scenes.tokenizer.vocab_size}, image="test_resnet"))
    task = Pretraining(model, replace(METER, masked_language=0.0))
    encode = CaptionEncoder(scenes.tokenizer, scenes.transform, True)
    evaluated = scenes.batch(replace(encode, training=False, texts_per_image="all"))
    learn(task, scenes.batch(encode), 150)
    assert task.evaluate(task.predict(evaluated))["mean_R@1"] == 100


@torch.no_grad()
def test_candidates_are_the_embeddings_where_their_number_is_given(tiny_model: MakeModel, several: Batch) -> None:
    """Of a model that brings trained embeddings, thousands of images, whose pairs would take hours."""
    task = Pretraining(tiny_model(), METER, retrieval=RetrievalConfig(rerank=2)).eval()
    records = task.predict(several)
    assert not task.all_pairs
    assert {"image", "texts", "tokens", "ids"} <= records[0].keys()
    assert "embeddings_TR_R@1" in task.evaluate(records)
