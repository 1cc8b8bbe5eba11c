"""A record's questions come out in one form, whatever form of answers they are given in; what is of no such form is a bad record that is named."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.cli import main
from vlm.data.check import check
from vlm.data.index import ShardSet, load_index
from vlm.data.records import BadRecord, Record, parse_record
from vlm.data.samples import answer_weights
from vlm.data.scan import scan, texts
from vlm.tasks.vqa import answer_list


def record(*questions: Any, key: str = "k") -> Record:
    return parse_record("toy", key, {"jpg": b"i", "json": json.dumps({"questions": list(questions)}).encode()})


def asked(answers: Any) -> dict[str, Any]:
    return {"question_id": 1, "question": "what colour?", "answers": answers}


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        (["red", "dark red"], ["red", "dark red"]),
        ([], []),
        ([2, 2.0, 2.5, -1, 1234567890123, 1e20], ["2", "2", "2.5", "-1", "1234567890123", "1e+20"]),
        ([{"answer": "red", "answer_id": 1, "answer_confidence": "yes"}, {"answer": 2}], ["red", "2"]),
        (["red", 2, {"answer": "blue"}], ["red", "2", "blue"]),
    ],
)
def test_answers_become_texts(given: list[Any], texts: list[str]) -> None:
    (question,) = record(asked(given)).questions
    assert question == asked(texts)
    assert set(answer_weights(question["answers"])) == {text.lower() for text in texts}


def test_a_question_may_lack_answers() -> None:
    without, null = record({"question_id": 1, "question": "what?"}, asked(None)).questions
    assert "answers" not in without
    assert null["answers"] is None


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ("red", "is 'red'"),
        ("", "is ''"),
        (2, "is 2"),
        ({"answer": "red"}, "is {'answer': 'red'}"),
        (["red", None], "holds None"),
        ([True], "holds True"),
        ([float("nan")], "holds nan"),
        ([float("inf")], "holds inf"),
        ([["red"]], r"holds \['red'\]"),
        ([{"text": "red"}], "holds {'text': 'red'}"),
        ([{"answer": None}], "holds {'answer': None}"),
        ([{"answer": {"answer": "red"}}], "holds {'answer': {"),
    ],
)
def test_other_answers_are_refused(answers: Any, said: str) -> None:
    with pytest.raises(
        BadRecord, match=f"toy/k: \"answers\" of the question 'what colour\\?' {said}.*; expected a list of texts"
    ) as caught:
        record({"question_id": 0, "question": "what?", "answers": ["dog"]}, asked(answers))
    assert caught.value.cause == "broken json"


def test_a_long_answer_is_not_shown_in_full() -> None:
    with pytest.raises(BadRecord) as caught:
        record(asked("red " * 10_000))
    assert len(str(caught.value)) < 400


def test_a_question_without_an_id_gets_one() -> None:
    questions = record(
        {"question": "what?"},
        {"question": "who?", "question_id": None},
        {"question": "why?", "question_id": 7},
        {"question": "what?"},
    ).questions
    assert [q["question_id"] for q in questions] == ["k/what?", "k/who?", 7, "k/what?/2"]
    assert record(*questions).questions == questions
    # the same beside other questions: where folders are joined, equal questions are still equal
    assert record({"question": "who?"}).questions == questions[1:2]


@pytest.mark.parametrize("name", [[1], {"id": 1}, 1.5, True])
def test_other_ids_are_refused(name: Any) -> None:
    with pytest.raises(
        BadRecord, match=r'toy/k: "question_id" is .*; expected a text or a whole number, or none'
    ) as caught:
        record({"question": "what?", "question_id": name})
    assert caught.value.cause == "broken json"


@pytest.fixture
def shards(tmp_path: Path, write_tar: Callable[..., None]) -> ShardSet:
    """Questions without ids, two of whose four records are usable."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(file, "PNG")
    members: dict[str, bytes] = {}
    for key, answers in {"a": ["red"], "b": "red", "c": [{"answer": "red"}, {"answer": "blue"}], "d": [None]}.items():
        members[f"{key}.png"] = file.getvalue()
        members[f"{key}.json"] = json.dumps({"questions": [{"question": "what?", "answers": answers}]}).encode()
    write_tar(tmp_path / "toy" / "0.tar", members)
    return load_index(tmp_path / "toy")


def test_what_is_learned_of_shards_are_whole_answers(shards: ShardSet) -> None:
    assert list(texts([shards])) == ["what?", "red", "what?", "red", "blue"]
    assert answer_list([shards]) == ["red", "blue"]
    assert [r.questions[0]["question_id"] for r in scan([shards])] == ["a/what?", "c/what?"]


def test_the_check_names_what_is_refused(shards: ShardSet) -> None:
    found = check(shards)
    assert found.counts == {"broken json": 2}
    assert "record 1 of 0.tar: toy/b: \"answers\" of the question 'what?' is 'red'" in str(found)
    assert "record 3 of 0.tar: toy/d: \"answers\" of the question 'what?' holds None" in str(found)


def test_an_evaluation_without_ids_ends_well(shards: ShardSet, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    config = str(Path(__file__).parents[2] / "configs/finetune/vqa/tiny.yaml")
    given = ["--checkpoint", str(checkpoint("vqa", ("red", "blue"))), "--split", "val", "--out", str(tmp_path / "out")]
    settings = {"splits.val": shards.root, "workers": "0", "batch-size": "2", "max-bad-fraction": "0.5"}
    more = [word for name, value in settings.items() for word in (f"--data.{name}", value)]
    assert main(["evaluate", config, *given, *more, "--train.precision", "fp32"]) == 0
    predictions = json.loads((tmp_path / "out/predictions.json").read_text())
    assert sorted(p["question_id"] for p in predictions) == ["a/what?", "c/what?"]
    assert {p["answer"] for p in predictions} <= {"red", "blue"}
