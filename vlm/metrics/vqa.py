"""Accuracy of answers to questions about images: the official evaluators of VQA, TextVQA and VizWiz, quirks included.

Source: VQA v2's evaluation code (Antol et al. 2015, Goyal et al. 2017; github.com/GT-Vision-Lab/VQA), which is Python 2
and gives no score for one's own file without a server. The quirks are kept because every published number has them:
answers are normalised only where the annotators' answers differ; a comma between two digits makes every other sign
vanish too, and a sign beside a space vanishes where others become a space; a period stays only before a digit, and only
32 of them are removed; four contractions can never be found, as the text is in lower case by then, and one loses its
apostrophe. On request it is done without these.

Two data sets with ten answers a question have evaluators of their own, which share the agreement and most of the
normalisation. TextVQA's (Singh et al. 2019; `TextVQAAccuracyEvaluator` of github.com/facebookresearch/mmf) always
normalises both sides. VizWiz' (Gurari et al. 2018; its Python API, from vizwiz.org) always normalises the prediction and
never the annotators' answers, and its contractions have typographic apostrophes.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vlm.errors import UserError
from vlm.metrics.captions import listed

Rules = Literal["vqa", "textvqa", "vizwiz", "plain"]
"""How a prediction and answers are compared: as the evaluator of that name does, or without the quirks of VQA's."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d", re.ASCII)
_PERIOD = re.compile(r"\.(?!\d)", re.ASCII)  # there: (?!<=\d)(\.)(?!\d), a lookbehind with a slip, which never holds
_COMMA = re.compile(r"(?<=\d),(?=\d)", re.ASCII)
_SIGNS_TO_SPACES = str.maketrans(dict.fromkeys(_PUNCTUATION, " "))
_PERIODS_REMOVED = 32  # there: re.UNICODE passed where the count goes
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_AGREEING = 3  # annotators that must have given an answer for it to be wholly right


def _contractions() -> dict[str, str]:
    """What is written without its apostrophe -> with it; the official table, including what it lacks and its slips."""
    whole = (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's"
        " isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've"
        " shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd"
        " there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've"
        " when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all"
        " you'd you'll you're you've"
    )
    table = {word.replace("'", ""): word for word in whole.split()}
    # Two apostrophes: found when the first or the second is missing, for the words and ways that the table has.
    both = "hadn't've he'd've it'd've mightn't've shouldn't've somebody'd've someone'd've something'd've there'd've"
    for word in (both + " couldn't've they'd've we'd've who'd've wouldn't've y'all'll she'd've you'd've").split():
        first, second = word.index("'"), word.rindex("'")
        table[word[:first] + word[first + 1 :]] = word
        table[word[:second] + word[second + 1 :]] = word
    return table | {
        "somebody'd": "somebodyd",
        "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at",
        "yall'd've": "y'all'd've",
        "y'alld've": "y'all'd've",
        "y'all'dve": "y'all'd've",
    }


CONTRACTIONS = _contractions()
_PLAIN_CONTRACTIONS = {key: word for key, word in CONTRACTIONS.items() if key != "somebody'd"} | {
    "im": "i'm", "ive": "i've", "id've": "i'd've", "i'dve": "i'd've"
}  # fmt: skip


def _vizwiz_contractions() -> dict[str, str]:
    """The same table in VizWiz' evaluator: an editor has made the apostrophes typographic, but for these keys and words."""
    keys = {"couldn'tve", "hadn'tve"}
    words = {"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"}
    return {
        key if key in keys else key.replace("'", "\u2019"): word if word in words else word.replace("'", "\u2019")
        for key, word in CONTRACTIONS.items()
    }


_VIZWIZ_CONTRACTIONS = _vizwiz_contractions()


def _trim(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer: str, quirks: bool = True) -> str:
    """An answer as the official evaluator compares it: no punctuation, no articles, number words as digits.

    'Two dogs!' -> '2 dogs'; 'U.S.A.' -> 'usa'; '1,000' -> '1000'; 'dont' -> "don't"; '10:30' stays. Without quirks every
    sign becomes a space, but a comma between digits vanishes; all periods that are not before a digit go; and the
    contractions are found that the official table means.
    """
    if quirks:
        return _plain_words(_without_signs(answer), CONTRACTIONS)
    text = _COMMA.sub("", _trim(answer)).translate(_SIGNS_TO_SPACES)
    return _plain_words(_PERIOD.sub("", text), _PLAIN_CONTRACTIONS)


def _without_signs(answer: str) -> str:
    """The official removal of punctuation."""
    answer = text = _trim(answer)
    number = _COMMA_IN_NUMBER.search(answer) is not None
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in answer or f" {sign}" in answer  # of the text as it was, not as changed so far
        text = text.replace(sign, "" if beside_space or number else " ")
    return _PERIOD.sub("", text, count=_PERIODS_REMOVED)


def _plain_words(text: str, contractions: Mapping[str, str]) -> str:
    """In lower case, number words as digits, no articles, contractions with their apostrophes."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def _textvqa(answer: str) -> str:
    """TextVQA's evaluator cuts before VQA's normalisation: no comma is left to make other signs vanish, and "dog's" is two words."""
    return normalize_answer(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def accuracy(prediction: str, answers: Sequence[str], rules: Rules = "vqa") -> float:
    """How right an answer is, 0..1, given what each annotator answered: their `agreement` with it.

    By VQA's rules both sides are normalised unless all annotators answered the same, by TextVQA's always, by VizWiz' the
    prediction alone; plain, without VQA's quirks, both sides always, and as `normalize_answer` says. A single answer
    (GQA, DAQUAR, easy-VQA) is one that all gave: by VQA's rules it is compared as it is, which is GQA's own accuracy.
    """
    if not answers:
        raise ValueError("answers is empty, expected the answer of at least one annotator.")
    prediction, answers = _compared(prediction, answers, rules)
    return agreement(answers.count(prediction), len(answers))


def _compared(prediction: str, answers: Sequence[str], rules: Rules) -> tuple[str, list[str]]:
    """Prediction and answers as the rules compare them; ValueError for rules of another name."""
    if rules == "textvqa":
        return _textvqa(prediction), [_textvqa(answer) for answer in answers]
    if rules == "vizwiz":
        return _plain_words(_without_signs(prediction), _VIZWIZ_CONTRACTIONS), list(answers)
    if rules == "plain":
        return normalize_answer(prediction, False), [normalize_answer(answer, False) for answer in answers]
    if rules != "vqa":
        raise ValueError(f"rules is {rules!r}, expected one of {', '.join(get_args(Rules))}.")
    prediction, answers = _trim(prediction), [_trim(answer) for answer in answers]
    if len(set(answers)) == 1:
        return prediction, answers
    return normalize_answer(prediction), [normalize_answer(answer) for answer in answers]


def agreement(matches: int, annotators: int) -> float:
    """The accuracy of an answer that `matches` of the annotators gave: of ten 0, 0.3, 0.6, 0.9, then 1.

    It is the mean, over the annotators, of min(1, matches among the others / 3). The official evaluators know ten
    annotators; fewer count as they are. Repeated up to ten, one answer of two would be five and wholly right, and of three
    the first would be worth most. Of two or three annotators fewer than three others are left: then all of them are
    needed, so that what everyone said is wholly right. One annotator speaks for all.
    """
    if annotators == 1:
        return float(matches)
    needed = min(_AGREEING, annotators - 1)
    given, others = min(1.0, max(0, matches - 1) / needed), min(1.0, matches / needed)
    return (matches * given + (annotators - matches) * others) / annotators


@dataclass(frozen=True, kw_only=True)
class VqaScores:
    """Accuracies in percent, unrounded; the official evaluator rounds to two digits when it prints."""

    overall: float
    perAnswerType: dict[str, float]  # noqa: N815   (the official names)
    perQuestionType: dict[str, float]  # noqa: N815
    per_question: dict[Any, float]
    """By question_id."""

    def rounded(self) -> dict[str, Any]:
        """The official result file: overall, perAnswerType, perQuestionType, rounded to two digits."""
        return {
            "overall": round(self.overall, 2),
            "perAnswerType": {name: round(value, 2) for name, value in self.perAnswerType.items()},
            "perQuestionType": {name: round(value, 2) for name, value in self.perQuestionType.items()},
        }


def vqa_scores(
    questions: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    rules: Rules = "vqa",
) -> VqaScores:
    """Score predictions for all of the questions.

    questions: [{"question_id", ...}]; annotations: [{"question_id", "answers": [{"answer", ...}], "answer_type"?,
    "question_type"?}], those of other questions are not looked at, and a type that is no text is none;
    predictions: [{"question_id", "answer"}]. rules: see `accuracy`.
    Raises UserError for a question without prediction or annotation, and for an unknown or repeated question_id.
    """
    asked = _by_question(questions, "questions")
    annotated = _by_question(annotations, "annotations")
    predicted = _by_question(predictions, "predictions")
    _check(asked, annotated, predicted)

    per_question: dict[Any, float] = {}
    groups: dict[str, defaultdict[str, list[float]]] = {
        key: defaultdict(list) for key in ("answer_type", "question_type")
    }
    for key in asked:
        answers = [_text(answer, key, "annotations") for answer in _answers(annotated[key], key)]
        score = accuracy(_text(predicted[key], key, "predictions"), answers, rules)
        per_question[key] = score
        for group, scores in groups.items():
            if isinstance(kind := annotated[key].get(group), str):
                scores[kind].append(score)
    by_answer, by_question = ({name: _percent(group[name]) for name in sorted(group)} for group in groups.values())
    return VqaScores(
        overall=_percent(list(per_question.values())),
        perAnswerType=by_answer,
        perQuestionType=by_question,
        per_question={key: 100 * score for key, score in per_question.items()},
    )


def _percent(scores: Sequence[float]) -> float:
    return 100 * sum(scores) / len(scores)


def _by_question(records: Sequence[Mapping[str, Any]], what: str) -> dict[Any, Mapping[str, Any]]:
    for position, record in enumerate(records):
        if not isinstance(record, Mapping) or not isinstance(record.get("question_id"), (int, str)):
            raise UserError(f'{what}, record {position}: {str(record)[:80]}; expected an object with a "question_id".')
    table = {record["question_id"]: record for record in records}
    if len(table) < len(records):
        counts = Counter(record["question_id"] for record in records)
        repeated = [key for key, count in counts.items() if count > 1]
        raise UserError(f"{what}: {listed(repeated, 'question_id')} occurring more than once; keep one record each.")
    return table


def _check(asked: Mapping[Any, Any], annotated: Mapping[Any, Any], predicted: Mapping[Any, Any]) -> None:
    if not asked:
        raise UserError("No question to score: the questions are empty.")
    if missing := [key for key in asked if key not in annotated]:
        raise UserError(
            f"annotations: {listed(missing, 'question')} of {len(asked)} without annotation; are questions and"
            " annotations of the same split?"
        )
    if unknown := [key for key in predicted if key not in asked]:
        texts = (
            " (the ids are texts there and numbers here: write them as numbers)" if _as_texts(unknown, asked) else ""
        )
        raise UserError(
            f"predictions: {listed(unknown, 'question_id')} not among the {len(asked)} questions{texts}; are they for"
            " another split?"
        )
    if missing := [key for key in asked if key not in predicted]:
        raise UserError(
            f"predictions: {listed(missing, 'question')} of {len(asked)} without an answer; the official evaluator"
            " demands an answer to every question, as a part of them is another test: answer all (an empty answer"
            " counts as wrong), or give a questions file with those that you answered."
        )


def _as_texts(unknown: Sequence[Any], asked: Mapping[Any, Any]) -> bool:
    return isinstance(unknown[0], str) and unknown[0] in {str(key) for key in asked}


def _answers(annotation: Mapping[str, Any], key: Any) -> Sequence[Any]:
    answers = annotation.get("answers")
    if not isinstance(answers, Sequence) or isinstance(answers, str) or not answers:
        raise UserError(
            f'annotations, question {key!r}: "answers" is {answers!r}, expected a list of {{"answer": ...}}.'
        )
    return answers


def _text(record: Any, key: Any, what: str) -> str:
    answer = record.get("answer") if isinstance(record, Mapping) else record
    if not isinstance(answer, str):
        raise UserError(f'{what}, question {key!r}: the answer is {answer!r}, expected text: "answer": "yes".')
    return answer
