"""The accuracies of TextVQA and VizWiz are those of their own evaluators, restated here; `vlm score vqa --rules` gives them."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from vlm.cli import main
from vlm.metrics.vqa import _VIZWIZ_CONTRACTIONS, CONTRACTIONS, accuracy

SIGNS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "ten": "10"}  # and those between
PIECES = (
    "yes the a none two dont don't don\u2019t cant can't dog's 's 1,000 U.S.A. 3. .5 t-shirt stop Stop! , ? - / ' 10:30"
)


def process(text: str, comma: str, contractions: dict[str, str]) -> str:
    """`processPunctuation` and `processDigitArticle`, which both evaluators took from VQA's."""
    out = text
    for sign in SIGNS:
        gone = sign + " " in text or " " + sign in text or re.search(comma, text)
        out = out.replace(sign, "" if gone else " ")
    out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out, count=32)
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in ("a", "an", "the"))


def textvqa(prediction: str, answers: list[str]) -> float:
    """`TextVQAAccuracyEvaluator` with `EvalAIAnswerProcessor`, of mmf/utils/m4c_evaluators.py."""

    def processed(text: str) -> str:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
        return process(text.replace("\n", " ").replace("\t", " ").strip(), r"(?<=\d)(\,)+(?=\d)", CONTRACTIONS)

    given = list(enumerate(processed(answer) for answer in answers))
    scores = {}
    for unique in {answer for _, answer in given}:
        matching = [sum(item[1] == unique for item in given if item != one) for one in given]
        scores[unique] = sum(min(1, count / 3) for count in matching) / len(given)
    return scores.get(processed(prediction), 0.0)


def vizwiz(prediction: str, answers: list[str]) -> float:
    """`VQAEval` of VizWiz' Python API; of its table of contractions those that occur in PIECES."""
    said = prediction.replace("\n", " ").replace("\t", " ").strip()
    said = process(said, r"(\d)(\,)(\d)", {"dont": "don\u2019t", "cant": "can't"})
    others = [[answer for j, answer in enumerate(answers) if i != j] for i in range(len(answers))]
    return sum(min(1, sum(answer == said for answer in left) / 3) for left in others) / len(answers)


@pytest.mark.parametrize(("rules", "official"), [("textvqa", textvqa), ("vizwiz", vizwiz)])
def test_accuracy_is_that_of_the_own_evaluator(rules, official):
    generator = random.Random(0)
    scores = []
    for _ in range(2000):
        texts = [" ".join(generator.choices(PIECES.split(), k=generator.randint(1, 2))) for _ in range(3)]
        texts.append(generator.choice(texts).replace(" ", "\n"))
        answers = generator.choices(texts, k=10) if generator.random() < 0.8 else texts[:1] * 10
        said = generator.choice(texts)
        scores.append(official(said, answers))
        assert accuracy(said, answers, rules) == pytest.approx(scores[-1], abs=1e-12), (said, answers)
    assert 0 in scores
    assert 1 in scores


@pytest.mark.parametrize(
    ("prediction", "answers", "vqa", "of_textvqa", "of_vizwiz"),
    [
        ("Stop!", ["stop"] * 10, 0, 1, 1),
        ("stop", ["Stop!"] * 10, 0, 1, 0),
        ("two", ["two"] * 10, 1, 1, 0),
        ("2", ["two"] * 9 + ["2"], 1, 1, 0.3),
        ("dog's", ["dog 's"] * 9 + ["cat"], 0, 1, 0),
        ("1,000 red-white", ["1000 red white"] * 9 + ["cat"], 0, 1, 0),  # a comma makes other signs vanish, but is gone in TextVQA's
        ("dont know", ["don't know"] * 9 + ["cat"], 1, 1, 0),
        ("dont know", ["don\u2019t know"] * 9 + ["cat"], 0, 0, 1),
    ],
)  # fmt: skip
def test_where_the_evaluators_differ(prediction, answers, vqa, of_textvqa, of_vizwiz):
    found = [accuracy(prediction, answers, rules) for rules in ("vqa", "textvqa", "vizwiz")]
    assert found == pytest.approx([vqa, of_textvqa, of_vizwiz])
    assert found[1:] == pytest.approx([textvqa(prediction, answers), vizwiz(prediction, answers)])


def test_vizwiz_contractions_are_those_of_its_evaluator():
    """All 114 that change a word in lower case, by the digest of the evaluator's own table; some of those whose apostrophes are its exceptions."""
    table = sorted((key, word) for key, word in _VIZWIZ_CONTRACTIONS.items() if key != word)
    digest = hashlib.sha256(json.dumps(table).encode()).hexdigest()
    assert (len(table), digest) == (114, "1b56f4d9fb5f9d43abaf4f338e42b384cafeba26966ca23c8eaf9814b7957343")
    for said, heard in (
        ("whove", "who've"),
        ("wheres", "where's"),
        ("hadn'tve", "hadn\u2019t\u2019ve"),
        ("whos", "who\u2019s"),
    ):
        assert accuracy(said, [heard] * 10, "vizwiz") == 1, said


def test_rules_of_another_name_are_refused():
    with pytest.raises(ValueError, match="rules is 'gqa', expected one of vqa, textvqa, vizwiz, plain"):
        accuracy("a", ["a"], "gqa")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The options that name the files of one question: all annotators said "Two", the prediction is "two"."""
    contents = {
        "questions": {"questions": [{"question_id": 1}]},
        "annotations": {"annotations": [{"question_id": 1, "answers": [{"answer": "Two"}] * 10}]},
        "predictions": [{"question_id": 1, "answer": "two"}],
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    return [part for name in contents for part in (f"--{name}", str(tmp_path / name))]


@pytest.mark.parametrize(
    ("more", "overall"),
    [
        ([], 0),
        (["--rules", "vqa"], 0),
        (["--rules", "textvqa"], 100),
        (["--rules", "vizwiz"], 0),
        (["--without-quirks"], 100),
    ],
)
def test_the_command_takes_the_rules(files, capsys, more, overall):
    assert main(["score", "vqa", *files, *more, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overall"] == overall


@pytest.mark.parametrize("more", [["--rules", "gqa"], ["--rules", "vizwiz", "--without-quirks"]])
def test_other_rules_and_two_at_once_are_refused(files, capsys, more):
    with pytest.raises(SystemExit):
        main(["score", "vqa", *files, *more])
    assert "--rules" in capsys.readouterr().err
