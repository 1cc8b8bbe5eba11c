"""A record's questions as its JSON gives them, brought to the one form that training and evaluation read."""

import math
from collections import Counter
from typing import Any

_ANSWERS = 'expected a list of texts, of numbers, or of objects with an "answer", such as ["red", "dark red"]'


def read_questions(given: Any, key: str) -> list[dict[str, Any]]:
    """The questions of the record `key`: dicts with "question" (a text), "question_id" (a text or a whole number), perhaps "answers" (texts), and
    whatever else is given. The dicts are changed in place.

    An answer may be given as a number or as VQA's {"answer": ...}. A question without an id gets one of key and text, not of its place: so it keeps
    it where records are joined or questions added.

    Raises ValueError that says what is wrong, where a question is of another form.
    """
    questions = given or []
    if not isinstance(questions, list) or not all(
        isinstance(q, dict) and isinstance(q.get("question"), str) for q in questions
    ):
        raise ValueError('"questions" is not a list of objects with a "question".')
    unnamed = False
    for question in questions:
        answers, name = question.get("answers"), question.get("question_id")
        if answers is not None and not (type(answers) is list and set(map(type, answers)) <= {str}):
            question["answers"] = _texts(answers, question["question"])
        if name is None:
            unnamed = True
        elif type(name) not in (int, str):
            raise ValueError(f'"question_id" is {name!r:.80}; expected a text or a whole number, or none.')
    if unnamed:
        _name(questions, key)
    return questions


def _texts(answers: Any, question: str) -> list[str]:
    if not isinstance(answers, list):
        raise ValueError(f'"answers" of the question {question!r:.80} is {answers!r:.80}; {_ANSWERS}.')
    texts = [_text(answer.get("answer") if isinstance(answer, dict) else answer) for answer in answers]
    wrong = [answer for answer, text in zip(answers, texts, strict=True) if text is None]
    if wrong:
        raise ValueError(f'"answers" of the question {question!r:.80} holds {wrong[0]!r:.80}; {_ANSWERS}.')
    return [text for text in texts if text is not None]


def _text(answer: Any) -> str | None:
    """The answer's text: 2 and 2.0 are "2". None where it has none, as true and NaN."""
    if type(answer) is float and math.isfinite(answer):
        return f"{answer:.15g}"
    return str(answer) if type(answer) in (str, int) else None


def _name(questions: list[dict[str, Any]], key: str) -> None:
    """Gives those without an id "key/text", with a number behind it where the record asks the same again."""
    asked: Counter[str] = Counter()
    for question in questions:
        text = question["question"]
        asked[text] += 1
        if question.get("question_id") is None:
            question["question_id"] = f"{key}/{text}" if asked[text] == 1 else f"{key}/{text}/{asked[text]}"
