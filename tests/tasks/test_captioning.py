"""Captioning: scenes are learnt by heart and told back exactly, whatever else is in the batch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.config import GenerationConfig, ModelConfig
from vlm.data.index import load_index
from vlm.data.samples import CaptionEncoder, JointEncoder, QuestionEncoder
from vlm.data.shards import ShardWriter
from vlm.data.text import tidy
from vlm.metrics.captions import caption_scores
from vlm.model.generation import Rules
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Features
from vlm.objectives.self_critical import SelfCritical
from vlm.tasks.captioning import CaptioningTask, caption_reward, generation_rules

PROMPT = "a picture of"


def encoder(scenes: Any, training: bool, prompt: str = "") -> CaptionEncoder:
    return CaptionEncoder(scenes.tokenizer, scenes.transform, training, prompt=prompt, texts_per_image="all")


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [("", {}), (PROMPT, {"decoder": "separate", "decoder_layers": 2})],
)
def test_scenes_learnt_by_heart_are_told_exactly(
    scenes: Any,
    learn: Callable[..., list[float]],
    tiny_config: Callable[..., ModelConfig],
    prompt: str,
    settings: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    text = {"vocab_size": scenes.tokenizer.vocab_size, "layers": 2, "cross_attention": (0, 1)}
    model = VisionLanguageModel(tiny_config(text=text, image="test_resnet", **settings))
    task = CaptioningTask(model, scenes.tokenizer, 0.1, prompt, GenerationConfig())
    totals = learn(task, scenes.batch(encoder(scenes, True, prompt)), 100)
    assert totals[-1] < 0.3 * totals[0]
    batch = scenes.batch(encoder(scenes, False, prompt))
    records = task.predict(batch)
    assert [r["caption"] for r in records] == [record.captions[0] for record in scenes.records]
    assert [r["image_id"] for r in records] == [0, 1, 2, 3]
    assert all(0.5 < r["confidence"] <= 1 for r in records)
    scores = task.evaluate(records)
    assert scores["Bleu_4"] == pytest.approx(100)
    assert scores["CIDEr"] == pytest.approx(1000)
    assert (scores["distinct"], scores["images"]) == (100, 4)
    assert task.official(records)[1] == {"image_id": 1, "caption": scenes.records[1].captions[0]}
    for row in range(4):
        assert (
            task.predict(scenes.batch(encoder(scenes, False, prompt), [row]))[0]["caption"] == records[row]["caption"]
        )
    task.blank_images = True
    assert len({r["caption"] for r in task.predict(batch)}) == 1


def test_a_record_an_image_with_all_its_references(scenes: Any, tiny_model: Callable[..., VisionLanguageModel]) -> None:
    model = tiny_model(text={"vocab_size": scenes.tokenizer.vocab_size})
    task = CaptioningTask(model, scenes.tokenizer, 0.1, "", GenerationConfig(max_length=8, min_length=2))
    several = [
        replace(record, captions=[*record.captions, f"another text {i}"][: 1 + i % 2])
        for i, record in enumerate(scenes.records)
    ]
    batch = replace(scenes, records=several).batch(encoder(scenes, False))
    assert len(batch.texts.ids) == 6
    records = task.predict(batch)
    assert [r["key"] for r in records] == [record.key for record in several]
    assert [r["references"] for r in records] == [record.captions for record in several]
    found = task.evaluate(records)
    expected = caption_scores({r["key"]: r["references"] for r in records}, {r["key"]: r["caption"] for r in records})
    assert found["CIDEr"] == 100 * expected.CIDEr
    assert found["ROUGE_L"] == 100 * expected.ROUGE_L
    for name, (low, high) in task.intervals(records).items():
        assert low <= found[name] <= high


def test_distinct_is_the_share_of_different_captions(
    scenes: Any, tiny_model: Callable[..., VisionLanguageModel]
) -> None:
    model = tiny_model(text={"vocab_size": scenes.tokenizer.vocab_size})
    task = CaptioningTask(model, scenes.tokenizer, 0.1, "", GenerationConfig())
    said = ["a dog", "a cat", "a dog", "a dog"]
    records = [{"key": str(i), "references": ["a dog runs"], "caption": caption} for i, caption in enumerate(said)]
    assert task.evaluate(records)["distinct"] == 50


def test_tars_that_count_their_keys_from_the_start_again_do_not_mix_their_scores(
    scenes: Any, tiny_model: Callable[..., VisionLanguageModel]
) -> None:
    model = tiny_model(text={"vocab_size": scenes.tokenizer.vocab_size})
    task = CaptioningTask(model, scenes.tokenizer, 0.1, "", GenerationConfig(max_length=8, min_length=2))
    said = [record.captions[0] for record in scenes.records]
    records = [{"key": key, "references": [text], "caption": text} for key, text in zip("abcd", said, strict=True)]
    records[0]["caption"] = "nothing of the kind"
    again = [{**record, "key": f"0000{i % 2}"} for i, record in enumerate(records)]
    assert task.evaluate(again) == task.evaluate(records)
    assert task.evaluate(again)["images"] == 4
    assert task.intervals(again) == task.intervals(records)


def test_the_reward_is_the_metric(scenes: Any, tmp_path: Path) -> None:
    """Of the training captions themselves it is CIDEr-D as it is reported."""
    texts = {
        "a": ["A red dog, running.", "a dog runs on grass"],
        "b": ["two cats sleep", "Two cats on a bed"],
        "c": ["a man"],
    }
    with ShardWriter(tmp_path / "shards", "toy") as writer:
        for key, captions in texts.items():
            writer.write(key, b"img", captions=captions, image_id=key)
    reward = caption_reward(scenes.tokenizer, [load_index(tmp_path / "shards")])
    drawn = ["a red square", "a dog runs", ""]
    ids = [scenes.tokenizer.encode(text)[1:-1] for text in drawn]
    said = {key: tidy(scenes.tokenizer.decode(tokens)) for key, tokens in zip(texts, ids, strict=True)}
    expected = caption_scores(texts, said).cider_per_image
    assert reward(ids, list(texts.values())) == pytest.approx(list(expected.values()), abs=1e-12)


def test_rewards_do_not_depend_on_which_captions_are_texts(
    scenes: Any, tiny_model: Callable[..., VisionLanguageModel], tmp_path: Path
) -> None:
    """One drawn, as is the default, all, or beside questions: the references are the record's captions."""
    words = [record.captions[0].split() for record in scenes.records]
    records = [
        replace(r, captions=[" ".join(part) for part in (said, said[::-1], said[1:])], questions=r.questions[: i % 2])
        for i, (r, said) in enumerate(zip(scenes.records, words, strict=True))
    ]
    with ShardWriter(tmp_path / "shards", "toy") as writer:
        for record in records:
            writer.write(record.key, b"img", captions=record.captions, image_id=record.key)
    reward = caption_reward(scenes.tokenizer, [load_index(tmp_path / "shards")])
    model = tiny_model(text={"vocab_size": scenes.tokenizer.vocab_size})
    objective = SelfCritical([scenes.tokenizer.cls_id], Rules(end_id=scenes.tokenizer.sep_id, max_length=9), reward)
    several = encoder(scenes, True)
    one = replace(several, texts_per_image="one")
    asked = QuestionEncoder(scenes.tokenizer, scenes.transform, True, form="prompted")
    totals = []
    for encode in (several, one, JointEncoder(one, asked)):
        batch = replace(scenes, records=records).batch(encode)
        image = model.encode_image(batch.images)
        features = Features(image, {}, {"decoder": model.memory(image.tokens, None, "decoder")})
        torch.manual_seed(0)
        loss = objective.loss(model, [], features, batch)
        totals.append((float(loss.sum.detach()), *map(float, loss.scalars["reward"])))
    assert totals == totals[:1] * 3
    assert totals[0][1] > 0


def test_rules_from_the_settings(scenes: Any) -> None:
    settings = GenerationConfig(
        max_length=4, min_length=9, repetition_penalty=1.5, no_repeat_ngram=3, no_doubled_words=True
    )
    rules = generation_rules(settings, scenes.tokenizer)
    assert (rules.max_length, rules.min_length, rules.end_id) == (4, 3, scenes.tokenizer.sep_id)
    assert (rules.repetition_penalty, rules.no_repeat_ngram, rules.no_doubled) == (1.5, 3, True)
