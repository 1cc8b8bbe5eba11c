"""Questions made from captions: what captions say and no more; and shards that have them beside all that they had."""

import random
from pathlib import Path

import pytest

from vlm.cli import main
from vlm.data.index import load_index
from vlm.data.made_questions import Made, QuestionMaker
from vlm.data.scan import scan
from vlm.data.shards import ShardWriter

THINGS = ["shirt", "horse", "beach", "dog", "fence", "ball", "hat", "bench", "kitchen", "cat"]
# Nouns are told by where they stand, which takes some captions.
OTHERS = [[f"a man is near the {thing} .", f"a {thing} in the picture ."] for thing in THINGS for _ in range(20)]


@pytest.fixture(scope="module")
def maker() -> QuestionMaker:
    return QuestionMaker(OTHERS)


def asked(maker: QuestionMaker, *captions: str) -> dict[str, str]:
    return {made.question: made.answer for made in maker(captions, 0, most=100)}


@pytest.mark.parametrize(
    ("caption", "question", "answer"),
    [
        ("Two men in red shirts are riding horses on a beach.", "How many men are there?", "2"),
        ("Two men in red shirts are riding horses on a beach.", "What color are the shirts?", "red"),
        ("Two men in red shirts are riding horses on a beach.", "What are the men riding?", "horses"),
        ("Two men in red shirts are riding horses on a beach.", "Where are the men?", "beach"),
        ("a black and white dog is jumping over the fence", "What color is the dog?", "black and white"),
        ("a black and white dog is jumping over the fence", "What is the dog doing?", "jumping"),
        ("a black and white dog is jumping over the fence", "What animal is this?", "dog"),
        ("A man in a grey hat is lying on a bench", "What color is the hat?", "gray"),
        ("the man is lying on a bench", "What is the man doing?", "lying down"),
        ("The girl throwing a small ball", "What is the girl throwing?", "ball"),
        ("a snowboarder in the air", "What sport is this?", "snowboarding"),
        ("a cat in the living room", "What room is this?", "living room"),
    ],
)
def test_what_a_caption_says_is_asked(maker: QuestionMaker, caption: str, question: str, answer: str) -> None:
    assert asked(maker, caption)[question] == answer


@pytest.mark.parametrize(
    ("captions", "question"),
    [
        (["a dog in a red shirt is running", "the dog has a blue shirt on"], "What color is the shirt?"),
        (["two dogs are there", "three dogs are there"], "How many dogs are there?"),
        (["a man in red stands on the beach"], "What color are the stands?"),
        (["a man and his boat are near the beach"], "Where is the man?"),
        (["the woman holding on the fence"], "What is the woman holding?"),
        (["a man is riding with a woman"], "What is the man riding?"),
    ],
)
def test_what_is_not_said_or_said_in_two_ways_is_not(maker: QuestionMaker, captions: list[str], question: str) -> None:
    assert question not in asked(maker, *captions)


def test_what_is_absent_is_common_and_named_by_no_caption(maker: QuestionMaker) -> None:
    captions = ["a dog is running to a ball", "two cats and a hat"]
    for seed in range(200):
        for made in maker(captions, seed, most=100):
            thing = made.question.removesuffix("?").removesuffix(" in the picture").split()[-1]
            if made.kind == "no":
                assert thing in set(THINGS) - {"dog", "ball", "cat", "hat"}
            if made.kind == "yes":
                assert thing in ("dog", "ball", "hat")


def test_an_image_gets_few_and_one_of_a_kind_whatever_its_captions(maker: QuestionMaker) -> None:
    words = [
        *THINGS,
        "a",
        "the",
        "red",
        "blue",
        "two",
        "man",
        "women",
        "riding",
        "on",
        "in",
        "at",
        "is",
        "and",
        "running",
        ".",
    ]
    for seed in range(300):
        chance = random.Random(seed)
        captions = [" ".join(chance.choices(words, k=chance.randrange(12))) for _ in range(chance.randrange(6))]
        found = maker(captions, seed, most=3)
        assert found == maker(captions, seed, most=3)
        assert len(found) <= 3
        assert len({made.kind for made in found}) == len(found)
        assert all(isinstance(made, Made) and made.question.endswith("?") and made.answer for made in found)


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "captioned", "coco", samples_per_shard=100) as writer:
        for number, captions in enumerate(OTHERS):
            there = [{"question_id": 1, "question": "is there a DOG?", "answers": ["yes", "no"]}] if number else []
            writer.write(f"k{number}", b"image %d" % number, "jpg", captions, there, number)
        writer.write("bare", b"image", "jpg", [], [{"question_id": 2, "question": "Why?"}], "other")
    return tmp_path / "captioned"


def test_shards_keep_all_that_they_had(captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "ask", str(captioned), "--out", str(tmp_path / "asked"), "--per-image", "2"]) == 0
    before, after = (list(scan([load_index(folder)])) for folder in (captioned, tmp_path / "asked"))
    assert len(before) == len(after) == len(OTHERS) + 1
    made = 0
    for old, new in zip(before, after, strict=True):
        assert (new.key, new.image, new.image_id, new.captions) == (old.key, old.image, old.image_id, old.captions)
        assert new.questions[: len(old.questions)] == old.questions
        added = new.questions[len(old.questions) :]
        assert len(added) <= 2
        assert all(q["synthetic"] is True and len(q["answers"]) == 1 for q in added)
        texts = [q["question"].casefold() for q in new.questions]
        assert len(set(texts)) == len(texts)
        made += len(added)
    assert f"{len(after)} images, {made:,} questions made (" in capsys.readouterr().out
    assert made > len(OTHERS)


def test_captions_that_give_no_question_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path / "german", "coco") as writer:
        writer.write("a", b"image", "jpg", ["ein Hund auf einer Wiese"], [], 1)
    assert main(["shards", "ask", str(tmp_path / "german"), "--out", str(tmp_path / "asked")]) == 1
    assert "English captions" in capsys.readouterr().err
    assert not (tmp_path / "asked").exists()
    assert main(["shards", "ask", str(tmp_path / "german"), "--out", str(tmp_path / "asked"), "--per-image", "0"]) != 0
    assert "--per-image 0" in capsys.readouterr().err
