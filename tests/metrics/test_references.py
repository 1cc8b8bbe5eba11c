"""Random inputs: never a crash or a NaN, and the reference implementation's number, where it is installed (`pip install --no-deps pycocoevalcap`; of
the official VQA evaluator `salesforce-lavis` carries the normalisation, `pip install --no-deps salesforce-lavis`).
"""

import importlib.util
import math
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vlm.metrics.captions import METRICS, CiderD, caption_scores, tokenized
from vlm.metrics.pope import pope_scores
from vlm.metrics.retrieval import retrieval_scores
from vlm.metrics.vqa import accuracy, normalize_answer

COUNTS = [200, pytest.param(10_000, marks=pytest.mark.slow)]
PIECES = "a the dog dogs man's runs on grass . , ! ( ) red t-shirt 3.5 isn't é 中 😀 “ '' ||| \u00a0 \u2028 \x00 - --"
ANSWER_PIECES = (
    "yes no a the none two dont Im somebody'd 1,000 U.S.A. , . ; / - ' ? : .5 3. 10:30 t-shirt yall'd've \n \t ( _ @"
)
WORDS, ANSWERS = PIECES.split(" "), ANSWER_PIECES.split(" ")


def random_text(generator: random.Random, pieces: list[str], longest: int) -> str:
    text = "".join(
        generator.choice(pieces) + generator.choice(("", " ", " ")) for _ in range(generator.randint(0, longest))
    )
    return text if generator.random() < 0.9 else text + chr(generator.randint(0, 0xD7FF))


def random_corpus(generator: random.Random) -> tuple[dict[int, list[str]], dict[int, str]]:
    keys = generator.sample(range(50), generator.randint(1, 5))
    references = {key: [random_text(generator, WORDS, 9) for _ in range(generator.randint(1, 4))] for key in keys}
    near = [random.Random(key).choice(captions) for key, captions in references.items()]  # so that n-grams are shared
    said = (text if generator.random() < 0.5 else random_text(generator, WORDS, 9) for text in near)
    return references, dict(zip(keys, said, strict=True))


@pytest.mark.parametrize("count", COUNTS)
def test_captions(count: int) -> None:
    generator = random.Random(0)
    for _ in range(count):
        scores = caption_scores(*random_corpus(generator))
        for each in (scores.corpus(), *scores.per_image.values()):
            assert all(0 <= value < (10.001 if name == "CIDEr" else 1.001) for name, value in each.items()), scores


@pytest.mark.parametrize("count", COUNTS)
def test_captions_equal_pycocoevalcap(count: int) -> None:
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    generator = random.Random(1)
    for _ in range(count):
        references, predictions = tokenized(*random_corpus(generator))
        if not any(caption for captions in references.values() for caption in captions):
            continue  # the reference stops there
        scores = caption_scores(references, predictions, tokenize=False)
        said = {key: [caption] for key, caption in predictions.items()}
        corpus, each = bleu.compute_score(references, said, verbose=0)
        (rouge_all, rouge_each), (cider_all, cider_each) = (m.compute_score(references, said) for m in (rouge, cider))
        assert list(scores.corpus().values()) == pytest.approx([*corpus, rouge_all, cider_all], abs=1e-9), references
        found = np.array([[scores.per_image[key][name] for name in METRICS] for key in references])
        assert found == pytest.approx(np.array([*each, rouge_each, cider_each]).T, abs=1e-9), references


def test_cider_with_the_frequencies_of_another_corpus() -> None:
    """Of a part of a corpus, with that corpus's frequencies: what its images get when all of it is scored."""
    generator = random.Random(2)
    for _ in range(50):
        references, predictions = tokenized(*random_corpus(generator))
        whole = caption_scores(references, predictions, tokenize=False)
        some = list(references)[: (len(references) + 1) // 2]
        part = caption_scores(
            {key: references[key] for key in some},
            {key: predictions[key] for key in some},
            tokenize=False,
            document_frequencies=CiderD(references.values()),
        )
        assert part.cider_per_image == {key: whole.cider_per_image[key] for key in some}


def official_normalisation() -> ModuleType:
    found = importlib.util.find_spec("lavis")
    if found is None or not found.submodule_search_locations:
        pytest.skip("salesforce-lavis is not installed")
    path = Path(found.submodule_search_locations[0]) / "common/vqa_tools/vqa_eval.py"
    spec = importlib.util.spec_from_file_location("vqa_eval", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # of the package this file alone: the package imports much
    return module


@pytest.mark.filterwarnings("ignore:invalid escape sequence", "ignore::SyntaxWarning")
@pytest.mark.parametrize("count", COUNTS)
def test_normalised_answers_equal_the_official_ones(count: int) -> None:
    official = official_normalisation().VQAEval()
    generator = random.Random(3)
    for _ in range(count):
        answer = random_text(generator, ANSWERS, 6).replace("\n", " ").replace("\t", " ").strip()
        if answer.isascii():  # a digit is an ASCII digit in Python 2, where the numbers come from
            assert normalize_answer(answer) == official.processDigitArticle(official.processPunctuation(answer))


@pytest.mark.parametrize("count", COUNTS)
def test_accuracy_equals_its_definition(count: int) -> None:
    """The mean over annotators of min(1, matches among the others / 3), with the answers normalised where they differ."""
    generator = random.Random(4)
    for _ in range(count):
        answers = [random_text(generator, ANSWERS, 2).replace("\n", " ").replace("\t", " ").strip() for _ in range(4)]
        given = generator.choices(answers, k=10) if generator.random() < 0.8 else answers[:1] * 10
        said = generator.choice(answers)
        for rules in ("vqa", "plain"):
            texts = [said, *given]
            if len(set(given)) > 1 or rules == "plain":
                texts = [normalize_answer(text, rules == "vqa") for text in texts]
            others = [texts[1:][:i] + texts[1:][i + 1 :] for i in range(10)]
            expected = sum(min(1, left.count(texts[0]) / 3) for left in others) / 10
            assert accuracy(said, given, rules) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count", COUNTS)
def test_retrieval_equals_sorting(count: int) -> None:
    """Of random scores without ties, by the place of the best right one in the sorted row."""
    generator = np.random.default_rng(5)
    for _ in range(count):
        images, each = generator.integers(1, 9), generator.integers(1, 4)
        owners = generator.permutation(np.repeat(np.arange(images), each))
        scores = generator.permutation(images * len(owners)).reshape(images, len(owners)).astype(np.float32)
        named = retrieval_scores(scores, np.arange(images), owners).named()
        first = [(owners[np.argsort(-row)] == image).argmax() for image, row in enumerate(scores)]
        places = [
            np.flatnonzero(np.argsort(-column) == owner)[0] for column, owner in zip(scores.T, owners, strict=True)
        ]
        for k in (1, 5, 10):
            assert named[f"TR_R@{k}"] == pytest.approx(100 * np.mean(np.array(first) < k))
            assert named[f"IR_R@{k}"] == pytest.approx(100 * np.mean(np.array(places) < k))
        assert named["mean_R@1"] == pytest.approx((named["TR_R@1"] + named["IR_R@1"]) / 2)


@pytest.mark.parametrize("count", COUNTS)
def test_pope_equals_counting(count: int) -> None:
    generator = random.Random(6)
    said = ["Yes", "No, it is not", "no", "NO", "There is one. Not two, no", "", "not", ",no ,", "a\nno", ". no"]
    means_no = [False, True, True, False, False, False, True, True, False, False]  # by the official script, run
    for _ in range(count):
        rows = generator.choices(range(len(said)), k=generator.randint(1, 12))
        labels = [generator.random() < 0.5 for _ in rows]
        scores = pope_scores(labels, [said[row] for row in rows], [None] * len(rows))["overall"]
        yes = [not means_no[row] for row in rows]
        tp, fp = (
            sum(a and b for a, b in zip(labels, yes, strict=True)),
            sum(not a and b for a, b in zip(labels, yes, strict=True)),
        )
        fn = sum(a and not b for a, b in zip(labels, yes, strict=True))
        precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
        right = len(rows) - fp - fn
        expected = [right / len(rows), precision, recall, f1, sum(yes) / len(rows)]
        assert list(scores.values()) == pytest.approx([100 * value for value in expected], abs=0.00501)
        assert all(math.isfinite(value) for value in scores.values())
