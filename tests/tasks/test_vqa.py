"""Visual question answering in both forms: learnt by heart, exact ranking, no influence of the batch, official scores."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

from vlm.config import Config, DataConfig, GenerationConfig, ModelConfig, ObjectivesConfig, VqaConfig
from vlm.data.batch import Batch
from vlm.data.samples import QuestionEncoder
from vlm.data.shards import ShardWriter, load_index
from vlm.errors import ConfigError
from vlm.metrics.vqa import normalize_answer, vqa_scores
from vlm.model import lengths
from vlm.model.ranking import score_answers
from vlm.model.vision_language import VisionLanguageModel
from vlm.tasks.vqa import EncoderDecoderVqa, PromptedVqa, Vqa, answer_list, answer_tree, build_vqa
from vlm.tasks.vqa_task import by_type

FORMS = ("prompted", "encoder_decoder")
QUESTION_DECODER: dict[str, Any] = {"decoder": "separate", "decoder_layers": 2, "decoder_reads": "question"}
TEN = ["red"] * 6 + ["Red."] * 2 + ["green", "blue"]  # as annotators answer


def encoder(scenes: Any, form: str, training: bool) -> QuestionEncoder:
    return QuestionEncoder(scenes.tokenizer, scenes.transform, training, form, texts_per_image="all")  # type: ignore[arg-type]


def answers(scenes: Any) -> list[str]:
    return sorted({q["answers"][0] for record in scenes.records for q in record.questions})


def build(scenes: Any, form: str, make: Callable[..., Any], inference: str = "rank", image: str = "test_vit") -> Any:
    """A task around what `make` makes of the model's settings."""
    text = {"vocab_size": scenes.tokenizer.vocab_size, "layers": 2, "cross_attention": (0, 1)}
    model = make(text=text, image=image, **(QUESTION_DECODER if form == "encoder_decoder" else {}))
    config = Config(
        vqa=VqaConfig(form=form, inference=inference),  # type: ignore[arg-type]
        data=DataConfig(max_answer_tokens=10),
        objectives=ObjectivesConfig(label_smoothing=0.0),
        generation=GenerationConfig(beams=2),
    )
    config = replace(config, model=getattr(model, "config", model))
    if isinstance(model, ModelConfig):
        torch.manual_seed(0)
        model = VisionLanguageModel(model)
    return build_vqa(model, scenes.tokenizer, config, [] if inference == "generate" else answers(scenes))


@pytest.mark.parametrize(("form", "inference"), [("prompted", "rank"), ("encoder_decoder", "generate")])
def test_scenes_learnt_by_heart_are_answered_rightly(
    scenes: Any,
    learn: Callable[..., list[float]],
    tiny_config: Callable[..., ModelConfig],
    form: str,
    inference: str,
) -> None:
    task = build(scenes, form, tiny_config, inference, "test_resnet")
    assert type(task) is (PromptedVqa if form == "prompted" else EncoderDecoderVqa)
    totals = learn(task, scenes.batch(encoder(scenes, form, True)), 120)
    assert totals[-1] < 0.1 * totals[0]
    batch = scenes.batch(encoder(scenes, form, False))
    records = task.predict(batch)
    asked = [q for record in scenes.records for q in record.questions]
    assert [r["question_id"] for r in records] == [q["question_id"] for q in asked]
    assert [r["answer"] for r in records] == [q["answers"][0] for q in asked]
    assert all(0.5 < r["confidence"] <= 1.0001 for r in records)
    scores = task.evaluate(records)
    assert (scores["accuracy"], scores["accuracy/yes/no"], scores["questions"]) == (100, 100, 16)
    assert task.official(records)[0] == {"question_id": 0, "answer": asked[0]["answers"][0]}


@pytest.mark.parametrize("form", FORMS)
def test_a_training_step_waits_for_no_device_and_learns_what_labels_looked_up_give(
    scenes: Any, tiny_model: Callable[..., VisionLanguageModel], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(lengths, "reads_lengths", lambda _: False)  # as on a GPU
    task, batch = build(scenes, form, tiny_model), scenes.batch(encoder(scenes, form, True))
    with profile() as profiled:
        loss = task(batch)["captioning"]
        loss.sum.backward()
    assert not {event.name for event in profiled.events()} & {"aten::_local_scalar_dense", "aten::nonzero"}
    looked_up = task(replace(batch, targets=None))["captioning"]
    assert loss.count > 0
    assert torch.equal(loss.sum, looked_up.sum)


@pytest.mark.parametrize("form", FORMS)
def test_ranking_equals_scoring_every_answer_alone(
    scenes: Any, tiny_model: Callable[..., VisionLanguageModel], form: str
) -> None:
    task = build(scenes, form, tiny_model)
    batch, tokenizer = scenes.batch(encoder(scenes, form, False)), scenes.tokenizer
    memory, ids, mask = task.prompt(batch)
    for row, record in enumerate(task.predict(batch)):
        prompt = ids[row][mask[row]].tolist()
        scores = {}
        for answer in answers(scenes):
            rest = tokenizer.encode(answer)[1:]
            text = torch.tensor([[*prompt, *rest]])
            with torch.no_grad():
                after = task.model.decode(text, memory.select(torch.tensor([row])))[0].log_softmax(1)
            scores[answer] = sum(float(after[len(prompt) - 1 + i, t]) for i, t in enumerate(rest))
        best = max(scores, key=lambda answer: scores[answer])
        assert record["answer"] == best
        assert record["confidence"] == pytest.approx(torch.tensor(scores[best]).exp().item(), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inference", ["rank", "generate"])
def test_an_answer_does_not_depend_on_the_batch(
    scenes: Any, tiny_model: Callable[..., VisionLanguageModel], form: str, inference: str
) -> None:
    task = build(scenes, form, tiny_model, inference)
    batch = scenes.batch(encoder(scenes, form, False))
    assert len(set(batch.texts.mask.sum(1).tolist())) > 1
    together = {r["question_id"]: (r["answer"], r["confidence"]) for r in task.predict(batch)}
    longest = {**scenes.records[0].questions[0], "question": "is there a red circle " * 3 + "?", "question_id": 99}
    for row, record in enumerate(scenes.records):
        for question in record.questions:
            alone = replace(record, questions=[question])
            padded = replace(record, questions=[longest, question])
            for records in ([alone], [padded]):
                own = replace(scenes, records=records).batch(encoder(scenes, form, False))
                found = task.predict(own)[-1]
                assert found["key"] == scenes.records[row].key
                answer, confidence = together[question["question_id"]]
                assert found["answer"] == answer
                assert found["confidence"] == pytest.approx(confidence, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_without_the_image_only_the_question_counts(
    scenes: Any, tiny_model: Callable[..., VisionLanguageModel], form: str
) -> None:
    task = build(scenes, form, tiny_model)
    batch = scenes.batch(encoder(scenes, form, False))
    other = replace(batch, images=255 - batch.images)

    def confidences(b: Batch) -> list[float]:
        return [r["confidence"] for r in task.predict(b)]

    assert confidences(batch) != pytest.approx(confidences(other), rel=1e-3)
    task.blank_images = True
    assert confidences(batch) == pytest.approx(confidences(other), rel=1e-9)
    by_question = defaultdict(set)
    for record in task.predict(batch):
        by_question[record["question"]].add(record["answer"])
    assert max(len(found) for found in by_question.values()) == 1
    training = scenes.batch(encoder(scenes, form, True))
    changed = replace(training, images=255 - training.images)
    torch.testing.assert_close(task(training)["captioning"].sum, task(changed)["captioning"].sum, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_of_a_questions_answers_sum_to_one(
    scenes: Any, tiny_model: Callable[..., VisionLanguageModel], form: str
) -> None:
    record = scenes.records[0]
    asked = [
        {**record.questions[0], "answers": TEN},
        record.questions[1],
        {**record.questions[2], "answers": ["yes", "no"]},
    ]
    task = build(scenes, form, tiny_model)
    batch = replace(scenes, records=[replace(record, questions=asked)]).batch(encoder(scenes, form, True))
    sums: dict[Any, float] = defaultdict(float)
    if form == "prompted":
        for source, weight in zip(batch.sources, batch.texts.weight.tolist(), strict=True):
            sums[source["question_id"]] += weight
        assert len(batch.texts.weight) == 3 + 1 + 2
    else:
        assert batch.answers is not None
        for text, weight in zip(batch.answers.text.tolist(), batch.answers.weight.tolist(), strict=True):
            sums[text] += weight
        assert batch.answers.weight.tolist() == pytest.approx([0.8, 0.1, 0.1, 1.0, 0.5, 0.5])
    assert list(sums.values()) == pytest.approx([1, 1, 1])
    loss = task(batch)["captioning"]
    assert float(task.counts(batch)["captioning"]) == pytest.approx(3)
    assert loss.count == task.counts(batch)["captioning"]


def test_the_loss_is_the_weighted_log_probability_of_the_answers(
    scenes: Any, tiny_model: Callable[..., VisionLanguageModel]
) -> None:
    record = replace(scenes.records[0], questions=[{**scenes.records[0].questions[0], "answers": TEN}])
    for form in FORMS:
        task = build(scenes, form, tiny_model)
        one = replace(scenes, records=[record])
        memory, ids, mask = task.prompt(one.batch(encoder(scenes, form, False)))
        prompt = ids[0][mask[0]].tolist()
        expected = 0.0
        for answer, weight in (("red", 0.8), ("green", 0.1), ("blue", 0.1)):
            rest = scenes.tokenizer.encode(answer)[1:]
            with torch.no_grad():
                after = task.model.decode(torch.tensor([[*prompt, *rest]]), memory)[0].log_softmax(1)
            expected -= weight * sum(float(after[len(prompt) - 1 + i, t]) for i, t in enumerate(rest))
        loss = task(one.batch(encoder(scenes, form, True)))["captioning"]
        assert float(loss.sum.detach()) == pytest.approx(expected, rel=1e-6), form


def test_evaluation_equals_the_official_scores(scenes: Any, tiny_model: Callable[..., VisionLanguageModel]) -> None:
    given = [
        ("2", TEN, "other"),
        ("red", TEN, "other"),
        ("The Cat.", ["cat"] * 9 + ["dog"], "other"),
        ("yes", ["no"] * 7 + ["yes"] * 3, "yes/no"),
        ("two", ["2"] * 10, "number"),
        ("2", ["two"] * 9 + ["2"], "number"),
    ]
    records = [
        {
            "question_id": i,
            "question": "Is it?" if i % 2 else "what color is it",
            "key": i // 2,
            "answer": answer,
            "probability": 0.25,
            "references": references,
            "answer_type": kind,
        }
        for i, (answer, references, kind) in enumerate(given)
    ]
    expected = vqa_scores(
        [{"question_id": i} for i in range(len(given))],
        [
            {"question_id": i, "answers": [{"answer": a} for a in references], "answer_type": kind}
            for i, (_, references, kind) in enumerate(given)
        ],
        [{"question_id": i, "answer": answer} for i, (answer, _, _) in enumerate(given)],
    )
    task: Vqa = build(scenes, "prompted", tiny_model)
    scores = task.evaluate(records)
    assert scores["accuracy"] == pytest.approx(expected.overall)
    assert {name: scores[f"accuracy/{name}"] for name in expected.perAnswerType} == pytest.approx(
        expected.perAnswerType
    )
    assert scores["questions"] == 6
    assert scores["mean_confidence"] == pytest.approx(25)
    assert scores["ece"] == pytest.approx(abs(scores["accuracy"] - 25))
    assert "ece_uncalibrated" not in scores
    intervals = task.intervals(records)
    assert set(intervals) == {"accuracy", *(f"accuracy/{name}" for name in expected.perAnswerType)}
    low, high = intervals["accuracy"]
    assert low < scores["accuracy"] < high
    kinds = by_type(records, "question_type")
    assert {kind: found["questions"] for kind, found in kinds.items()} == {"is it": 3, "what color": 3}
    assert sum(found["accuracy"] for found in kinds.values()) / 2 == pytest.approx(expected.overall)
    assert by_type([{**record, "question_type": "mine"} for record in records], "question_type").keys() == {"mine"}
    task.temperature = 0.5
    assert task.evaluate(records)["mean_confidence"] == pytest.approx(100 * 0.25**2)
    assert task.evaluate(records)["ece_uncalibrated"] == scores["ece"]
    # A test split has no answers: nothing is scored, and nothing stops.
    assert task.evaluate([{**record, "references": []} for record in records]) == {"questions": 0}
    assert task.intervals([{**record, "references": []} for record in records]) == {}


def test_the_answer_list_counts_questions(scenes: Any, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", "a") as writer:
        for number, given in enumerate([["red"] * 3 + ["Blue!"], ["red", "green"], ["", "."], ["blue"]]):
            asked = [{"question_id": number, "question": "what color?", "answers": given}]
            writer.write(f"k{number}", scenes.records[0].image, extension="png", questions=asked)
    sets = [load_index(tmp_path / "a")]
    assert answer_list(sets) == ["blue", "red", "green"]  # two questions each, then by the alphabet
    assert answer_list(sets, 2) == ["blue", "red"]
    assert answer_list(sets, 3) == []


def test_the_answer_list_is_normalised_and_says_what_people_write(scenes: Any, tmp_path: Path) -> None:
    """Answers that the official evaluator takes for one are one, written as most write it; METER counts each question's commonest only."""
    given = [
        ["two", "two", "2", "T-shirt"],
        ["Two.", "the t shirt", "t-shirt", "a"],
        ["#1", "2", "2"],
        ["red"],
        ["red"],
    ]
    with ShardWriter(tmp_path / "a", "a") as writer:
        for number, answers_given in enumerate(given):
            asked = [{"question_id": number, "question": "what?", "answers": answers_given}]
            writer.write(f"k{number}", scenes.records[0].image, extension="png", questions=asked)
    sets = [load_index(tmp_path / "a")]
    assert answer_list(sets) == ["2", "red", "t-shirt", "#1"]  # 3 times "2" and 3 times "two": the alphabet's first
    assert answer_list(sets, commonest=True) == ["2", "red", "t-shirt"]
    assert answer_list(sets, 2, commonest=True) == ["2", "red"]
    names = [normalize_answer(answer) for answer in answer_list(sets)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("form", FORMS)
def test_scoring_the_whole_list_gives_the_same_answer_and_its_share(
    scenes: Any, tiny_model: Callable[..., VisionLanguageModel], form: str
) -> None:
    best, whole = build(scenes, form, tiny_model), build(scenes, form, tiny_model, "rank_all")
    batch = scenes.batch(encoder(scenes, form, False))
    scores = score_answers(whole.model, *whole.prompt(batch), whole.tree)
    for one, other, row in zip(best.predict(batch), whole.predict(batch), scores, strict=True):
        assert one["answer"] == other["answer"] == whole.answers[int(row.argmax())]
        assert other["probability"] == pytest.approx(float(row.softmax(0).max()), rel=1e-6)
        assert one["probability"] < other["probability"] <= 1


def test_answers_of_equal_tokens_are_one(scenes: Any) -> None:
    tree, kept = answer_tree(scenes.tokenizer, ["red circle", "Red  circle", "red", ""], 10)
    assert kept == ["red circle", "red"]
    assert len(tree) == 2


def test_what_does_not_fit_together_is_refused(scenes: Any, tiny_config: Callable[..., ModelConfig]) -> None:
    shared, question = tiny_config(), tiny_config(**QUESTION_DECODER)
    for form, model, message in (
        ("encoder_decoder", shared, "needs model.decoder=separate"),
        ("prompted", question, "needs a decoder that reads the image"),
    ):
        config = Config(model=model, vqa=VqaConfig(form=form))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            build_vqa(None, scenes.tokenizer, config, ["yes"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"min_answer_count"):
        build_vqa(None, scenes.tokenizer, Config(model=shared), [])  # type: ignore[arg-type]


def test_training_without_answers_says_what_is_missing(
    scenes: Any, tiny_model: Callable[..., VisionLanguageModel], batch: Batch
) -> None:
    task = build(scenes, "encoder_decoder", tiny_model)
    with pytest.raises(ValueError, match="the batch has no answers"):
        task.counts(replace(batch, answers=None))
