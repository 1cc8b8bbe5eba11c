"""VQA accuracy is the official evaluator's. Expected values marked [ran] came out of its code, ported to Python 3."""

import itertools
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.errors import UserError
from vlm.metrics.vqa import accuracy, agreement, normalize_answer, vqa_scores

PIECES = "a the two none dont 1,000 U.S.A. , . ; / - ' ? : 3.5 10:30 yes no t-shirt"
ANSWER = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(PIECES.split()), max_size=5).map(" ".join),
)


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [  # [ran]
        ("U.S.A.", "usa"),
        ("1,000", "1000"),
        ("yes, sir", "yes sir"),
        ("a/b", "b"),
        ("t-shirt", "t shirt"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("10:30", "10:30"),
        ("$5", "$5"),
        ("50%", "50%"),
        ("The Cat.", "cat"),
        ("3.", "3"),
        (".5", ".5"),
        ("3.5", "3.5"),
        ("dont", "don't"),
        ("Im here", "im here"),  # the table's "Im" never matches: the text is in lower case
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("yall'd've", "y'all'd've"),
        ("red,white", "red white"),
        ("1,000 red-white", "1000 redwhite"),  # a comma in a number makes every sign vanish
        ("a - b", "b"),
        ("x/-y p-q", "x y p q"),  # beside a space in the original text, not in what became of it
        ("an apple", "apple"),
        (" \n yes\tno ", "yes no"),
        ("", ""),
        ("the", ""),
        ("." * 40, "." * 8),  # only 32 periods go
        (".\u0663 .3", "\u0663 .3"),  # Python 2's \\d knows the digits 0 to 9 alone
    ],
)
def test_normalization_is_the_official_one(answer, normalized):
    assert normalize_answer(answer) == normalized


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), *((m, 1) for m in range(4, 11))]
)
def test_of_ten_annotators_the_closed_form(matches, expected):
    answers = ["red"] * matches + [f"other{n}" for n in range(10 - matches)]
    assert accuracy("red", answers) == pytest.approx(expected, abs=1e-12)


def test_equals_leaving_out_each_annotator_in_turn():
    for answers in itertools.product(["yes", "no", "2"], repeat=5):
        others = [[*answers[:i], *answers[i + 1 :]] for i in range(5)]
        expected = sum(min(1, left.count("yes") / 3) for left in others) / 5
        assert accuracy("yes", answers) == pytest.approx(expected, abs=1e-12)


def test_unanimous_answers_are_compared_as_they_are():
    assert accuracy("The Cat.", ["cat"] * 10) == 0
    assert accuracy("The Cat.", ["cat"] * 9 + ["dog"]) == 1
    assert accuracy(" cat\n", ["cat"] * 10) == 1
    assert accuracy("cat", ["cat", "cat "] * 5) == 1  # the same after trimming, hence unanimous
    assert accuracy("t shirt", ["t-shirt"] * 10) == 0


@pytest.mark.parametrize("rules", ["vqa", "textvqa", "vizwiz", "plain"])
@pytest.mark.parametrize("said", ["cat", " cat", "The Cat.", "dog", "two"])
def test_a_single_answer_is_one_that_all_gave(said, rules):
    """GQA's own accuracy; files for `vlm score vqa` have ten copies of it."""
    for answer in ("cat", "2", "The cat"):
        assert accuracy(said, [answer], rules) == accuracy(said, [answer] * 10, rules)
    assert accuracy(said, ["cat"]) == (said.strip() == "cat")
    assert accuracy("The Cat.", ["cat"], "plain") == accuracy("two", ["2"], "plain") == 1


@pytest.mark.parametrize("annotators", range(1, 12))
def test_agreement_is_leaving_each_annotator_out(annotators):
    for matches in range(annotators + 1):
        answers = ["red"] * matches + [f"other{n}" for n in range(annotators - matches)]
        assert agreement(matches, annotators) == pytest.approx(accuracy("red", answers), abs=1e-12)
    assert agreement(annotators, annotators) == 1


def test_few_annotators_can_be_matched_fully():
    assert accuracy("a", ["a", "a"]) == accuracy("b", ["b", "b", "b"]) == 1
    assert accuracy("red", ["red", "blue"]) == 0.5
    assert accuracy("red", ["red", "blue", "green"]) == pytest.approx(1 / 3)
    assert accuracy("green", ["red", "blue", "green"]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="at least one annotator"):
        accuracy("a", [])


@settings(max_examples=80, deadline=None)
@given(ANSWER, st.lists(ANSWER, min_size=1, max_size=10), st.randoms())
def test_any_answers_give_a_share_that_does_not_depend_on_their_order(prediction, answers, random):
    value = accuracy(prediction, answers)
    assert 0 <= value <= 1
    shuffled = random.sample(answers, len(answers))
    assert accuracy(prediction, shuffled) == pytest.approx(value, abs=1e-12)
    assert accuracy(answers[0], answers) > 0  # whatever an annotator said counts for something


@settings(max_examples=80, deadline=None)
@given(ANSWER)
def test_normalized_answers_hold_no_article_and_no_capital(answer):
    words = normalize_answer(answer).split(" ")
    assert not {"a", "an", "the", "two", "none"} & set(words)
    assert not set(string.ascii_uppercase) & set("".join(words))


def record(key, answers, kind="other", question_type="what"):
    return {
        "question_id": key,
        "answer_type": kind,
        "question_type": question_type,
        "answers": [{"answer": answer, "answer_id": n} for n, answer in enumerate(answers)],
    }


ANNOTATIONS = [
    record(1, ["yes"] * 10, "yes/no", "is the"),
    record(2, ["red"] * 2 + ["blue"] * 8),
    record(3, ["2"] * 3 + [str(n) for n in range(10, 17)], "number", "how many"),
    record(4, ["cat"] * 9 + ["dog"]),
]
QUESTIONS = [{"question_id": key, "question": "?"} for key in (1, 2, 3, 4)]
PREDICTIONS = [
    {"question_id": key, "answer": answer} for key, answer in {1: "yes", 2: "red", 3: "two", 4: "A cat"}.items()
]


def test_scores_of_a_file():
    scores = vqa_scores(QUESTIONS, ANNOTATIONS, PREDICTIONS)
    assert scores.overall == pytest.approx((100 + 60 + 90 + 100) / 4)
    assert scores.perAnswerType == pytest.approx({"number": 90, "other": 80, "yes/no": 100})
    assert scores.perQuestionType == pytest.approx({"how many": 90, "is the": 100, "what": 80})
    assert scores.per_question == pytest.approx({1: 100, 2: 60, 3: 90, 4: 100})
    assert vqa_scores(QUESTIONS[::-1], ANNOTATIONS[::-1], PREDICTIONS[::-1]).rounded() == scores.rounded()


def test_rounding_has_two_digits_as_the_official_file():
    three = [record(key, ["a"] * 10) for key in (1, 2, 3)]
    given_answers = [{"question_id": key, "answer": answer} for key, answer in {1: "a", 2: "b", 3: "c"}.items()]
    scores = vqa_scores(QUESTIONS[:3], three, given_answers)
    assert scores.overall == pytest.approx(100 / 3)
    assert scores.rounded()["overall"] == scores.rounded()["perAnswerType"]["other"] == 33.33


def test_annotations_without_types_and_of_other_questions():
    bare = [{"question_id": 1, "answers": [{"answer": "yes"}]}, *ANNOTATIONS[1:]]
    scores = vqa_scores(QUESTIONS[:1], bare, PREDICTIONS[:1])
    assert scores.overall == 100
    assert scores.perAnswerType == scores.perQuestionType == {}


@pytest.mark.parametrize("kind", [None, 5, ["other"], {"name": "other"}])
@pytest.mark.parametrize("group", ["answer_type", "question_type"])
def test_a_type_that_is_no_text_is_none(group, kind):
    scores = vqa_scores(QUESTIONS, [*ANNOTATIONS[:3], ANNOTATIONS[3] | {group: kind}], PREDICTIONS)
    assert len(scores.per_question) == 4
    found = scores.perAnswerType if group == "answer_type" else scores.perQuestionType
    assert found == pytest.approx(
        {"number": 90, "other": 60, "yes/no": 100}
        if group == "answer_type"
        else {"how many": 90, "is the": 100, "what": 60}
    )


def test_annotators_count_even_where_their_records_are_identical():
    same = [{"question_id": 1, "answers": [{"answer": "yes"}] * 10}]
    assert vqa_scores(QUESTIONS[:1], same, PREDICTIONS[:1]).overall == 100


@pytest.mark.parametrize(
    ("questions", "annotations", "predictions", "message"),
    [
        ([], ANNOTATIONS, [], "questions are empty"),
        (QUESTIONS, ANNOTATIONS[:3], PREDICTIONS, r"annotations: 1 question \(4\) of 4 without annotation"),
        (QUESTIONS, ANNOTATIONS, PREDICTIONS[:1], r"3 questions \(2, 3, 4\) of 4 without an answer; the official"),
        (QUESTIONS[:3], ANNOTATIONS, PREDICTIONS, r"1 question_id \(4\) not among the 3 questions"),
        (
            QUESTIONS[:1],
            ANNOTATIONS,
            [{"question_id": "1", "answer": "yes"}],
            r"1 question_id \('1'\).*the ids are texts there and numbers here",
        ),
        (
            QUESTIONS,
            ANNOTATIONS,
            PREDICTIONS * 2,
            r"predictions: 4 question_ids \(1, 2, 3, 4\) occurring more than once",
        ),
        (
            QUESTIONS,
            ANNOTATIONS,
            [{"answer": "yes"}],
            'predictions, record 0: .*expected an object with a "question_id"',
        ),
        (
            QUESTIONS[:1],
            ANNOTATIONS,
            [{"question_id": 1, "answer": 5}],
            'predictions, question 1: the answer is 5, expected text: "answer": "yes"',
        ),
        (
            QUESTIONS[:1],
            [{"question_id": 1, "answers": []}],
            PREDICTIONS[:1],
            r'annotations, question 1: "answers" is \[\]',
        ),
    ],
)
def test_unusable_input_is_refused_and_named(questions, annotations, predictions, message):
    with pytest.raises(UserError, match=message):
        vqa_scores(questions, annotations, predictions)


def test_of_many_only_the_first_are_named():
    many = [{"question_id": key} for key in range(100)]
    with pytest.raises(UserError, match=r"100 questions \(0, 1, 2, 3, 4, \.\.\.\)"):
        vqa_scores(many, [], [])


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("1,000 red-white", "1000 red white"),
        ("x/-y p-q", "x y p q"),
        ("yes, sir", "yes sir"),
        ("t-shirt", "t shirt"),
        ("Im here", "i'm here"),
        ("somebody'd", "somebody'd"),
        ("couldn'tve", "couldn't've"),
        ("." * 40, ""),
        (".5 and 3.", ".5 and 3"),
        ("The U.S.A.", "usa"),
    ],
)
def test_normalization_without_quirks(answer, normalized):
    assert normalize_answer(answer, quirks=False) == normalized


def test_without_quirks_unanimous_answers_are_normalised_too():
    assert accuracy("The Cat.", ["cat"] * 10, "plain") == 1
    assert accuracy("t shirt", ["t-shirt"] * 10, "plain") == 1
    scores = [
        vqa_scores(QUESTIONS[:1], [record(1, ["cat"] * 10)], [{"question_id": 1, "answer": "A cat"}], rules)
        for rules in ("vqa", "plain")
    ]
    assert [score.overall for score in scores] == [0, 100]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(PIECES.split()), max_size=5).map(" ".join))
def test_without_quirks_normalizing_twice_changes_nothing(answer):
    once = normalize_answer(answer, quirks=False)
    assert normalize_answer(once, quirks=False) == once
