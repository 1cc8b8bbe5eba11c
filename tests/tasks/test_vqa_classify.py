"""Question answering as classification: soft targets as the official evaluator scores, the published loss, learnt by heart, saved and used."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlm.checkpoint import read_answers, write_checkpoint
from vlm.config import Config, DataConfig, ModelConfig, VqaConfig
from vlm.data.samples import QuestionEncoder
from vlm.errors import CheckpointError, ConfigError
from vlm.metrics.vqa import accuracy
from vlm.model.pretrained import load_pretrained
from vlm.model.vision_language import VisionLanguageModel
from vlm.predictor import Predictor
from vlm.start import known_classifier
from vlm.tasks.vqa import build_vqa
from vlm.tasks.vqa_classify import ClassifyVqa

LIST = ["yes", "no", "2", "red", "t-shirt", "traffic light"]
CLASSIFY = Config(task="vqa", vqa=VqaConfig(form="classify"))


def encoder(scenes: Any, training: bool, **settings: Any) -> QuestionEncoder:
    return QuestionEncoder(scenes.tokenizer, scenes.transform, training, "classify", texts_per_image="all", **settings)


def answers(scenes: Any) -> list[str]:
    return sorted({q["answers"][0] for record in scenes.records for q in record.questions})


def settings(scenes: Any, tiny_config: Callable[..., ModelConfig], count: int, image: str = "test_vit") -> ModelConfig:
    text = {"vocab_size": scenes.tokenizer.vocab_size, "layers": 2, "cross_attention": (0, 1)}
    return tiny_config(text=text, image=image, heads=("classifier",), answers=count)


@pytest.fixture
def task(scenes: Any, tiny_config: Callable[..., ModelConfig]) -> ClassifyVqa:
    torch.manual_seed(0)
    model = VisionLanguageModel(settings(scenes, tiny_config, len(answers(scenes)))).double().eval()
    built = build_vqa(model, scenes.tokenizer, replace(CLASSIFY, model=model.config), answers(scenes))
    assert isinstance(built, ClassifyVqa)
    return built


def test_a_target_is_the_official_accuracy_of_the_answer(scenes: Any, tiny_config: Callable[..., ModelConfig]) -> None:
    built = ClassifyVqa(VisionLanguageModel(settings(scenes, tiny_config, len(LIST))), LIST)
    spoken = ["Yes", "no.", "two", "2", "The red", "T-shirt", "t shirt", "traffic light", "elsewhere", "", "a"]
    generator = random.Random(0)
    given = [[generator.choice(spoken) for _ in range(10)] for _ in range(200)]
    given += [[word] * n + ["other", "another"] * ((10 - n) // 2) for word in spoken for n in (2, 4, 8)]
    targets = built.targets([{"answers": one} for one in given])
    for one, row in zip(given, targets.tolist(), strict=True):
        assert len(set(one)) > 1  # else the evaluator compares the answers as they are
        assert row == pytest.approx([accuracy(answer, one) for answer in LIST])
    assert {round(v, 2) for row in targets.tolist() for v in row} >= {0, 0.3, 0.6, 0.9, 1}
    agreed = built.targets([{"answers": ["Two"] * 10}, {"answers": ["elsewhere"] * 10}, {}, {"answers": ["red"]}])
    assert agreed.tolist() == [[0, 0, 1, 0, 0, 0], [0] * 6, [0] * 6, [0, 0, 0, 1, 0, 0]]


def test_the_loss_is_the_published_one(scenes: Any, task: ClassifyVqa) -> None:
    """The mean binary cross-entropy times the number of answers; and each term of it, by hand."""
    best, other = task.answers[0], task.answers[1]
    ten = [best] * 6 + [f"{best.title()}."] * 2 + [other, "nowhere"]
    first = scenes.records[0]
    asked = [{**first.questions[0], "answers": ten}, {**first.questions[1], "answers": ["nowhere"]}]
    records = [replace(first, questions=asked), *scenes.records[1:]]
    batch = replace(scenes, records=records).batch(encoder(scenes, True))
    assert batch.answers is None
    logits = task.model.answer_logits(task.question_states(batch)).detach()
    targets = task.targets(batch.sources).double()
    assert targets[0].tolist() == pytest.approx([1.0, 0.3, *[0.0] * (len(task.answers) - 2)])
    assert not targets[1].any()
    loss, count = task(batch)["classifying"], task.counts(batch)["classifying"]
    assert loss.count == count == len(batch.sources) == 14
    published = F.binary_cross_entropy_with_logits(logits, targets) * len(task.answers)
    assert float(loss.sum.detach() / count) == pytest.approx(float(published), rel=1e-9)
    by_hand = 0.0
    for row, wanted in zip(logits.tolist(), targets.tolist(), strict=True):
        for z, t in zip(row, wanted, strict=True):
            p = 1 / (1 + math.exp(-z))
            by_hand -= t * math.log(p) + (1 - t) * math.log(1 - p)
    assert float(loss.sum.detach()) == pytest.approx(by_hand, rel=1e-6)


def test_bad_samples_have_no_part(scenes: Any, task: ClassifyVqa) -> None:
    batch = scenes.batch(encoder(scenes, True), [0, 1])
    weight = batch.texts.weight.clone()
    weight[4:] = 0
    silent = replace(batch, texts=replace(batch.texts, weight=weight))
    alone = scenes.batch(encoder(scenes, True), [0])
    loss, expected = task(silent)["classifying"], task(alone)["classifying"]
    assert float(loss.sum.detach()) == pytest.approx(float(expected.sum.detach()), rel=1e-9)
    assert loss.count == expected.count == 4


def test_scenes_learnt_by_heart_are_answered_rightly(
    scenes: Any, learn: Callable[..., list[float]], tiny_config: Callable[..., ModelConfig]
) -> None:
    torch.manual_seed(0)
    model = VisionLanguageModel(settings(scenes, tiny_config, len(answers(scenes)), "test_resnet"))
    task = build_vqa(model, scenes.tokenizer, replace(CLASSIFY, model=model.config), answers(scenes))
    totals = learn(task, scenes.batch(encoder(scenes, True)), 60)
    assert totals[-1] < 0.1 * totals[0]
    records = task.predict(scenes.batch(encoder(scenes, False)))
    asked = [q for record in scenes.records for q in record.questions]
    assert [r["answer"] for r in records] == [q["answers"][0] for q in asked]
    assert all(0.5 < r["confidence"] <= 1 for r in records)
    assert task.evaluate(records)["accuracy"] == 100


def test_an_answer_does_not_depend_on_the_batch(scenes: Any, task: ClassifyVqa) -> None:
    together = task.predict(scenes.batch(encoder(scenes, False)))
    alone = [
        task.predict(replace(scenes, records=[replace(r, questions=[q])]).batch(encoder(scenes, False)))[0]
        for r in scenes.records
        for q in r.questions
    ]
    assert [r["answer"] for r in alone] == [r["answer"] for r in together]
    assert [r["probability"] for r in alone] == pytest.approx([r["probability"] for r in together], rel=1e-9)


def test_a_checkpoint_answers_as_the_task(scenes: Any, tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = VisionLanguageModel(settings(scenes, tiny_config, len(answers(scenes)))).eval()
    config = replace(CLASSIFY, model=model.config, data=DataConfig(max_tokens=35))
    write_checkpoint(tmp_path / "vqa", config, model, scenes.tokenizer.to_json(), {}, answers=answers(scenes))
    loaded, metadata = load_pretrained(tmp_path / "vqa")
    assert metadata["model"]["heads"] == ["classifier"]
    task = build_vqa(loaded, scenes.tokenizer, config, read_answers(tmp_path / "vqa"))
    expected = task.predict(scenes.batch(encoder(scenes, False)))
    predictor = Predictor.load(tmp_path / "vqa", "cpu")
    said = [predictor.answer(r.image, q["question"]) for r in scenes.records for q in r.questions]
    assert [s.text for s in said] == [r["answer"] for r in expected]
    assert [s.confidence for s in said] == pytest.approx([r["confidence"] for r in expected], rel=1e-4)
    assert len({s.confidence for s in said}) > 10
    predictor.answers.pop()
    with pytest.raises(CheckpointError, match=r"answers\.json has"):
        predictor.answer(scenes.records[0].image, "what color is it?")
    with pytest.raises(CheckpointError, match="no language head"):
        predictor.caption([scenes.records[0].image])


def test_known_answers_keep_their_outputs(scenes: Any, tiny_config: Callable[..., ModelConfig]) -> None:
    torch.manual_seed(0)
    before = VisionLanguageModel(settings(scenes, tiny_config, 3))
    after = VisionLanguageModel(settings(scenes, tiny_config, 4))
    assert before.answer_head is not None
    assert after.answer_head is not None
    start = after.answer_head.output.weight.clone()
    state = known_classifier(before.state_dict(), ["yes", "no", "red"], ["red", "blue", "yes", "two"], after)
    after.load_state_dict(state)
    assert torch.equal(after.answer_head.output.weight[[0, 2]], before.answer_head.output.weight[[2, 0]])
    assert torch.equal(after.answer_head.output.weight[[1, 3]], start[[1, 3]])
    unknown = known_classifier(before.state_dict(), ["yes", "no", "red"], list("abcd"), after)
    assert not [name for name in unknown if name.startswith("answer_head.output")]


def test_what_does_not_fit_together_is_refused(
    scenes: Any, tiny_config: Callable[..., ModelConfig], tiny_model: Callable[..., VisionLanguageModel]
) -> None:
    with pytest.raises(ConfigError, match=r"model\.answers=0"):
        VisionLanguageModel(tiny_config(heads=("classifier",)))
    with pytest.raises(CheckpointError, match="no classifier head"):
        build_vqa(tiny_model(), scenes.tokenizer, CLASSIFY, ["yes"])
    with pytest.raises(CheckpointError, match="has 1 answers, the classifier 2"):
        build_vqa(VisionLanguageModel(settings(scenes, tiny_config, 2)), scenes.tokenizer, CLASSIFY, ["yes"])


@pytest.mark.parametrize("form", ["classify", "encoder_decoder", "prompted"])
def test_questions_of_a_set_with_a_weight_weigh_so(
    scenes: Any, tiny_config: Callable[..., ModelConfig], form: Any
) -> None:
    """The published sum of weighted losses over the number of questions, whatever their set."""
    text = {"vocab_size": scenes.tokenizer.vocab_size, "layers": 2, "cross_attention": (0, 1)}
    shape: dict[str, Any] = {"heads": ("language", "classifier"), "answers": len(answers(scenes))}
    if form == "encoder_decoder":
        shape |= {"decoder": "separate", "decoder_layers": 2, "decoder_reads": "question"}
    torch.manual_seed(0)
    model = VisionLanguageModel(tiny_config(text=text, **shape)).double().eval()
    config = Config(task="vqa", model=model.config, vqa=VqaConfig(form=form))
    task = build_vqa(model, scenes.tokenizer, config, answers(scenes))
    own, extra = scenes.records[0], replace(scenes.records[1], source="visual_genome")
    encode = replace(encoder(scenes, True, set_weights={"visual_genome": 0.2}), form=form)

    def loss(*records: Any) -> Any:
        (found,) = task(replace(scenes, records=list(records)).batch(encode)).values()
        return found

    own_batch = replace(scenes, records=[extra]).batch(encode)
    texts = own_batch.texts
    silent = replace(own_batch, texts=replace(texts, weight=torch.zeros_like(texts.weight)))
    assert own_batch.weight.tolist() == pytest.approx([0.2 * weight for weight in texts.weight.tolist()])
    assert not silent.weight.any()
    both, first, second = loss(own, extra), loss(own), loss(replace(extra, source="scenes"))
    assert float(both.sum.detach()) == pytest.approx(float((first.sum + 0.2 * second.sum).detach()), rel=1e-6)
    assert float(both.count) == pytest.approx(8)
