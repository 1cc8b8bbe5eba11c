"""Baselines that count answers and never look at the picture."""

import pytest

from vlm.metrics.baselines import fit_question_type_baseline, majority_answer, question_type


def test_the_majority_is_counted_after_normalization():
    assert majority_answer(["Yes.", "yes", "no", "the no", "YES"]) == "yes"
    assert majority_answer(["two", "2", "three"]) == "2"
    assert majority_answer(["red", "blue"]) == "blue"  # a tie does not depend on the order
    assert majority_answer(["the", "", "x"]) == "x"
    with pytest.raises(ValueError, match="no answer to count"):
        majority_answer(["", "a"])


def test_a_question_is_answered_by_its_longest_known_beginning():
    questions = ["How many dogs?", "How many cats?", "How big is it?", "Is it red?", "Is it on?", "Is the sun up?"]
    answers = [["2", "2", "3"], ["2"], ["large"] * 2, ["yes"], ["yes"], ["no"]]
    baseline = fit_question_type_baseline(questions, answers)
    assert baseline.answer("how MANY people are here?") == "2"
    assert baseline.answer("Is the door open?") == "no"
    assert baseline.answer("Is a door open?") == "yes"  # "is a" was never seen: by "is"
    assert baseline.answer("Why?") == baseline.overall == "2"
    assert baseline.answer("") == baseline.overall


def test_first_words():
    assert question_type("  What   color is it?") == "what color"
    assert question_type("Why?", words=3) == "why"


def test_uneven_lists_are_refused():
    with pytest.raises(ValueError, match="2 questions but answers to 1"):
        fit_question_type_baseline(["a?", "b?"], [["x"]])
