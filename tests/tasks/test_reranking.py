"""Re-ranking equals looking at each candidate pair alone, whatever is scored together."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vlm.config import ObjectivesConfig, RetrievalConfig
from vlm.data.batch import Batch
from vlm.errors import ConfigError
from vlm.model.vision_language import VisionLanguageModel
from vlm.tasks.pretraining import Pretraining
from vlm.tasks.reranking import By, Texts, join_texts, rerank

MakeModel = Callable[..., VisionLanguageModel]
LATE: dict[str, Any] = {"fusion": "late", "text": {"cross_attention": (2, 3)}}
TEXTS = [([2, *range(5 + i, 6 + i + 3 * (i % 4)), 3], 1 + (i % 2)) for i in range(9)]


def alone(model: VisionLanguageModel, tokens: torch.Tensor, text: tuple[list[int], int], by: By) -> float:
    """The log odds of one pair, or the log likelihood, without padding."""
    ids, prompt = torch.tensor([text[0]]), text[1]
    mask = torch.ones_like(ids, dtype=torch.bool)
    if by == "matching":
        states = model.fuse(model.text_view(ids, mask), model.memory(tokens[None], None, "fusion"))
        chances = model.matching_logits(states)[0].softmax(0)
        return float((chances[1] / chances[0]).log())
    logits = model.decode(ids, model.memory(tokens[None], None, "decoder"))[0].log_softmax(1)
    return sum(float(logits[i - 1, ids[0, i]]) for i in range(prompt, ids.shape[1]))


@pytest.mark.parametrize("settings", [{}, LATE], ids=["full", "late"])
@pytest.mark.parametrize("by", ["matching", "captioning"])
@pytest.mark.parametrize("k", [1, 2, 100])
@torch.no_grad()
def test_it_equals_every_candidate_alone(tiny_model: MakeModel, by: By, k: int, settings: dict[str, Any]) -> None:
    model = tiny_model(**settings)
    images = model.encode_image(torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)).tokens
    texts = join_texts(TEXTS, 0, model.device)
    similarity = np.random.default_rng(0).normal(size=(5, 9))
    found = rerank(model, images, texts, similarity, k, by)
    ratio = np.array([[alone(model, image, text, by) for text in TEXTS] for image in images])
    near_image = similarity >= np.sort(similarity, axis=1)[:, -min(k, 9), None]
    near_text = similarity >= np.sort(similarity, axis=0)[-min(k, 5), None, :]
    near = near_image | near_text
    if by == "captioning":
        for j in range(9):
            ratio[:, j] -= np.log(np.mean(np.exp(ratio[near[:, j], j])))
    expected = similarity / float(model.temperature) + ratio
    np.testing.assert_allclose(found[near], expected[near], rtol=0, atol=1e-9)
    if not near.all():
        assert found[~near].max() < found[near].min()
        np.testing.assert_allclose(
            np.diff(np.sort(found[~near])), np.diff(np.sort(similarity[~near] / float(model.temperature))), atol=1e-6
        )
    for pairs, chunk in ((1, 1), (3, 2), (1000, 5)):
        np.testing.assert_allclose(
            rerank(model, images, texts, similarity, k, by, pairs, chunk), found, rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("settings", [{}, LATE], ids=["full", "late"])
def test_each_image_and_each_text_is_read_once(
    tiny_model: MakeModel, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory for both directions together; what a text's pairs have in common apart from the pairs."""
    model, projected, embedded = tiny_model(**settings), [], []
    memory, encode_text = model.memory, model.encode_text
    monkeypatch.setattr(model, "memory", lambda tokens, *rest: projected.append(len(tokens)) or memory(tokens, *rest))
    monkeypatch.setattr(model, "encode_text", lambda ids, mask: embedded.append(len(ids)) or encode_text(ids, mask))
    images = model.encode_image(torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)).tokens
    similarity = np.random.default_rng(0).normal(size=(5, 9))
    rerank(model, images, join_texts(TEXTS, 0, model.device), similarity, 4, "matching", 3, 2)
    assert projected == [2, 2, 1]
    assert sum(embedded) == (len(TEXTS) if settings else 0)


@pytest.mark.parametrize("settings", [{}, LATE], ids=["full", "late"])
def test_half_precision_moves_scores_little(tiny_model: MakeModel, settings: dict[str, Any]) -> None:
    """Tokens, and in late fusion the texts' states, are kept in it."""
    exact = tiny_model(**settings)
    single = copy.deepcopy(exact).float()
    images = exact.encode_image(torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)).tokens
    texts, similarity = join_texts(TEXTS, 0, exact.device), np.zeros((5, 9))
    wanted = rerank(exact, images, texts, similarity, 9, "matching")
    found = rerank(single, images.half(), texts, similarity, 9, "matching")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.05)
    assert np.ptp(wanted) > 1


def test_join_texts_pads() -> None:
    texts = join_texts([([2, 5, 3], 1), ([2, 3], 2)], 0, torch.device("cpu"))
    assert texts.ids.tolist() == [[2, 5, 3], [2, 3, 0]]
    assert texts.mask.tolist() == [[True, True, True], [True, True, False]]
    assert isinstance(short := texts.select(torch.tensor([1, 1])), Texts)
    assert short.ids.tolist() == [[2, 3], [2, 3]]
    assert short.prompt.tolist() == [2, 2]


def test_no_candidate_is_refused(tiny_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match="k=0"):
        rerank(
            tiny_model(),
            torch.zeros(1, 5, 16),
            join_texts([([2, 3], 1)], 0, torch.device("cpu")),
            np.zeros((1, 1)),
            0,
            "matching",
        )


@pytest.mark.parametrize("by", ["matching", "captioning"])
def test_a_run_scores_by_the_second_look_and_says_the_first(tiny_model: MakeModel, batch: Batch, by: By) -> None:
    model = tiny_model()
    objectives = ObjectivesConfig(captioning=1.0)
    plain = Pretraining(model, objectives)
    task = Pretraining(model, objectives, retrieval=RetrievalConfig(rerank=2, by=by)).eval()
    records = task.predict(batch)
    scores = task.evaluate(records)
    assert {k: v for k, v in plain.evaluate(plain.predict(batch)).items() if k != "images"} == {
        name.removeprefix("embeddings_"): value for name, value in scores.items() if name.startswith("embeddings_")
    }
    looked = task._retrieve(records)
    assert task._retrieve(records) is looked
    assert set(task.intervals(records)) == {"TR_R@1", "IR_R@1"}
    task.train()
    assert task._found is None
    blank = replace(batch, images=batch.images)  # the records of another evaluation are ranked anew
    assert task._retrieve(task.predict(blank)) is not looked
