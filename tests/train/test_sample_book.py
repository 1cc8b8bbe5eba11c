"""Held-out pictures at each evaluation: spread over the set, with what the model in hand says of them, for every task."""

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.build import Parts, build_parts, build_task, load_sets
from vlm.config import Config
from vlm.data.index import ShardSet
from vlm.data.walk import walk
from vlm.errors import ConfigError
from vlm.run import known_answers, train
from vlm.samples import SampleBook
from vlm.tasks.task import Task
from vlm.train.report import read_json_lines

Made = tuple[SampleBook, Task, Parts, ShardSet]


@pytest.fixture
def book(make_config: Callable[..., Config]) -> Callable[..., Made]:
    """book({"task": "vqa"}): a book of the validation scenes, with an untrained task."""

    def make(changes: dict[str, Any]) -> Made:
        config = make_config(changes)
        sets = load_sets(config.data.splits.train, "train")
        (held_out,) = load_sets(config.data.splits.val, "val")
        parts = build_parts(config, sets)
        task = build_task(parts.config, parts, known_answers(config, sets)).eval()
        return SampleBook(parts, {"scenes": held_out}), task, parts, held_out

    return make


PRETRAINING = {"task": "pretraining", "objectives.matching": 0.0, "objectives.masked_language": 0.0}


def test_pictures_are_spread_and_captions_are_the_task_s(book: Callable[..., Made]) -> None:
    made, task, _, shards = book({"train.samples": 4, "train.evaluate_images": 12})
    chosen = made.sets["scenes"]
    keys = [found.record.key for found in walk(shards)]  # type: ignore[union-attr]
    assert [key for key, _ in chosen.pictures] == [keys[i] for i in (0, 3, 6, 9)]
    samples = made._samples(task, chosen)
    predicted = [record["caption"] for record in task.predict(chosen.batch)]
    assert [sample.said[0].text for sample in samples] == predicted
    records = [found.record for found in walk(shards)]
    assert samples[1].references == tuple(records[3].captions)  # type: ignore[union-attr]


def test_a_page_of_answers_names_questions_and_what_people_said(book: Callable[..., Made], tmp_path: Path) -> None:
    made, task, parts, _ = book({"task": "vqa", "train.samples": 2})
    made.show(task, 7, None)  # of another rank: nothing is written
    assert not Path(parts.config.out).exists()
    samples = made._samples(task, made.sets["scenes"])
    assert len(samples) == 2
    for sample in samples:
        assert 1 <= len(sample.said) <= 4
        assert sample.references == ()
    one = samples[0].said[0]
    assert one.label.endswith("?")
    assert "people: " in one.note
    assert one.right == (one.text in one.note.partition("people: ")[2])


@pytest.mark.parametrize("rerank", [0, 3])
def test_pretraining_shows_the_text_that_it_would_retrieve(book: Callable[..., Made], rerank: int) -> None:
    more = {"objectives.matching": 1.0, "retrieval.rerank": rerank} if rerank else {}
    made, task, _, shards = book({**PRETRAINING, **more, "train.samples": 13, "train.evaluate_images": 13})
    task.eval()
    samples = made._samples(task, made.sets["scenes"])
    records = task.predict(made.sets["scenes"].batch)  # with all pictures shown, the pool is the evaluation's
    scores = task.evaluate(records)
    right = [sample.said[0].right for sample in samples]
    assert 100 * sum(map(bool, right)) / len(right) == pytest.approx(scores["TR_R@1"])
    texts = sum(len(found.record.captions) for found in walk(shards))  # type: ignore[union-attr]
    assert samples[0].said[0].label == f"nearest of {texts} texts"
    assert all("number" in sample.said[0].note for sample in samples if not sample.said[0].right)
    assert [len(sample.said) for sample in samples] == [1] * 13


def test_pretraining_with_a_decoder_also_captions(book: Callable[..., Made]) -> None:
    made, task, *_ = book({**PRETRAINING, "objectives.captioning": 1.0, "train.samples": 2, "data.prompt": "a "})
    before = torch.get_rng_state()
    made.show(task, 3, None)
    assert torch.equal(before, torch.get_rng_state())  # a training goes on as if nobody had looked
    for sample in made._samples(task, made.sets["scenes"]):
        assert [one.label.split()[0] for one in sample.said] == ["nearest", "caption"]


def test_every_evaluation_of_a_run_writes_a_page(make_config: Callable[..., Config]) -> None:
    config = make_config({"train.samples": 3, "train.evaluate_every": 3})
    train(config)
    folder = Path(config.out) / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000003.html", "step-000006.html"]
    page = unescape((folder / "step-000006.html").read_text())
    assert page.count("<img ") == 3
    assert len(re.findall("<b>[^<]+</b>", page)) == 3
    steps = [line["step"] for line in read_json_lines(Path(config.out) / "log.jsonl") if line["kind"] == "evaluation"]
    assert steps == [3, 6]


def test_none_are_shown_where_none_are_asked_for(make_config: Callable[..., Config]) -> None:
    config = make_config({"train.samples": 0})
    train(config)
    assert not (Path(config.out) / "samples").exists()
    with pytest.raises(ConfigError, match=r"train\.samples=-1"):
        make_config({"train.samples": -1})


def test_a_record_that_cannot_be_used_is_passed_over(
    book: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm import samples as module
    from vlm.data.records import BadRecord

    read = module.read_at

    def damaged(reader: Any, shards: ShardSet, place: Any) -> Any:
        return BadRecord("no image", "gone") if place.number % 2 == 0 else read(reader, shards, place)

    monkeypatch.setattr(module, "read_at", damaged)
    made, task, _, _ = book({"train.samples": 12})
    assert 0 < len(made._samples(task, made.sets["scenes"])) < 12
    monkeypatch.setattr(module, "read_at", lambda *_: BadRecord("no image", "gone"))
    made, task, _, _ = book({"train.samples": 12})
    assert made.sets == {}


def test_half_precision_shows_and_scores_as_well(make_config: Callable[..., Config]) -> None:
    """In fp16; bf16 is in test_half_precision.py."""
    everything = {"task": "pretraining", "objectives.captioning": 1.0, "retrieval.rerank": 3}
    config = make_config({**everything, "train.samples": 3, "train.precision": "fp16"})
    scores = train(config)
    assert {"TR_R@1", "IR_R@1"} <= set(next(iter(scores.values())))
    page = unescape((Path(config.out) / "samples/step-000006.html").read_text())
    assert page.count("nearest of") == page.count("caption") == 3
