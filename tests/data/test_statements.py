"""What questions of yes or no state."""

import pytest

from vlm.data.statements import statement


@pytest.mark.parametrize(
    ("question", "stated"),
    [
        ("Is this a kitchen?", "a kitchen"),
        ("is that an old  bus ?", "an old bus"),
        ("Is it the ocean?", "the ocean"),
        ("Could this be wine tasting?", "wine tasting"),
        ("Could this be a hotel room?", "a hotel room"),
        ("Are there any boats in the water?", "boats in the water"),
        ("Is there a dog in the picture?", "a dog"),
        ("Are there people?", "people"),
        ("Can you see a chair?", "a chair"),
        ("Do you see any water in this photo?", "water"),
        ("Is this man surfing?", "a man surfing"),
        ("Are these bananas ripe?", "bananas ripe"),
    ],
)
def test_a_question_states_what_is_there_if_the_answer_is_yes(question: str, stated: str) -> None:
    assert statement(question) == stated


@pytest.mark.parametrize(
    "question",
    [
        "What is this?",
        "How many dogs are there?",
        "Is the man tall?",
        "Is he happy?",
        "Does this bus stop here?",
        "Is this bread fresh?",
        "Is this?",
        "",
    ],
)
def test_other_questions_state_nothing(question: str) -> None:
    """Where nothing is stated so plainly, nothing is made up."""
    assert statement(question) is None
