"""BLEU, ROUGE-L and CIDEr-D equal pycocoevalcap; golden_captions.json holds its output."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.errors import UserError
from vlm.metrics.captions import METRICS, caption_scores

GOLDEN = json.loads((Path(__file__).parent / "golden_captions.json").read_text(encoding="utf-8"))

REFERENCES = {
    1: ["a cat sits on the mat", "there is a cat on a mat", "the cat is on the mat"],
    2: ["a man rides a red bike", "a person riding a bicycle down the street"],
    3: ["two dogs play in the snow", "a pair of dogs running through snow"],
}
PREDICTIONS = {1: "a cat on the mat", 2: "a man rides a bicycle", 3: "two dogs run in snow"}

CAPTION = st.lists(st.sampled_from(["a", "dog", "runs", "on", "grass", "man's", "3.5", "\u00a0"]), max_size=7).map(
    " ".join
)
CORPUS = st.dictionaries(
    st.integers(0, 9), st.tuples(st.lists(CAPTION, min_size=1, max_size=4), CAPTION), min_size=1, max_size=5
)


def split(corpus):
    return {key: pair[0] for key, pair in corpus.items()}, {key: pair[1] for key, pair in corpus.items()}


def test_published_golden_values():
    scores = caption_scores(REFERENCES, PREDICTIONS)
    bleu = [scores.Bleu_1, scores.Bleu_2, scores.Bleu_3, scores.Bleu_4]
    assert bleu == pytest.approx([0.764149, 0.684999, 0.554770, 0.390690], abs=1e-6)
    assert scores.CIDEr == pytest.approx(2.964466, abs=1e-6)
    assert list(scores.cider_per_image.values()) == pytest.approx([3.952775, 3.246994, 1.693630], abs=1e-6)
    rouge = [scores.per_image[key]["ROUGE_L"] for key in REFERENCES]
    assert rouge == pytest.approx([0.894428, 0.715543, 0.715543], abs=1e-6)
    first = caption_scores(REFERENCES, {key: captions[0] for key, captions in REFERENCES.items()})
    assert first.CIDEr == pytest.approx(5.217164, abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_to_pycocoevalcap_on_odd_captions(metric):
    scores = caption_scores(GOLDEN["references"], GOLDEN["predictions"])
    assert scores.corpus()[metric] == pytest.approx(GOLDEN["corpus"][metric], abs=1e-9)
    each = [scores.per_image[key][metric] for key in GOLDEN["references"]]
    assert each == pytest.approx(GOLDEN["per_image"][metric], abs=1e-9)


def test_one_image_has_no_cider_but_the_other_scores():
    scores = caption_scores({1: REFERENCES[1]}, {1: PREDICTIONS[1]})
    assert scores.CIDEr == 0
    assert scores.Bleu_1 > 0.5
    assert scores.per_image[1]["ROUGE_L"] == pytest.approx(0.894428, abs=1e-6)


def test_a_perfect_caption_has_bleu_and_rouge_of_one():
    scores = caption_scores(REFERENCES, {key: captions[0] for key, captions in REFERENCES.items()})
    assert scores.Bleu_4 == pytest.approx(1, abs=1e-6)
    assert scores.per_image[2]["ROUGE_L"] == pytest.approx(1)


def test_an_empty_caption_is_the_longest_common_part_of_an_empty_reference():
    """pycocoevalcap's own: both are one empty word, where punctuation was all that a reference had."""
    scores = caption_scores({1: [".", "a cat"], 2: ["a dog"]}, {1: "", 2: ""})
    assert {key: scores.per_image[key]["ROUGE_L"] for key in (1, 2)} == {1: 1, 2: 0}
    assert {scores.per_image[key][name] for key in (1, 2) for name in ("Bleu_1", "CIDEr")} == {0}


@pytest.mark.parametrize("empty", ["", "   ", "...", "!"])
def test_an_empty_caption_scores_nothing_and_harms_no_other(empty):
    scores = caption_scores(REFERENCES, PREDICTIONS | {2: empty})
    assert all(value == 0 for value in scores.per_image[2].values())
    assert scores.per_image[1] == caption_scores(REFERENCES, PREDICTIONS).per_image[1]


def test_the_brevity_penalty_takes_the_closest_reference_the_shorter_of_two():
    references = {1: ["w x y z", "w x y z p q"], 2: ["k l"]}
    scores = caption_scores(references, {1: "w x y z p", 2: "k l"}, tokenize=False)
    assert scores.per_image[1]["Bleu_1"] == pytest.approx(1, abs=1e-6)  # reference length 4, not 6: no penalty
    short = caption_scores({1: ["w x y z"]}, {1: "w x"}, tokenize=False)
    assert short.Bleu_1 == pytest.approx(math.exp(1 - 4 / 2), abs=1e-6)


def test_repeating_a_word_counts_only_as_often_as_a_reference_has_it():
    scores = caption_scores({1: ["the dog and the cat"]}, {1: "the the the the the"}, tokenize=False)
    assert scores.Bleu_1 == pytest.approx(2 / 5, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(CORPUS, st.randoms())
def test_any_corpus_has_finite_scores_that_do_not_depend_on_the_order(corpus, random):
    scores = caption_scores(*split(corpus))
    for name, value in scores.corpus().items():
        assert 0 <= value <= (10.000001 if name == "CIDEr" else 1.000001)
    keys = list(corpus)
    random.shuffle(keys)
    shuffled = caption_scores(*split({key: (corpus[key][0][::-1], corpus[key][1]) for key in keys}))
    assert shuffled.corpus() == pytest.approx(scores.corpus(), abs=1e-12)
    assert {key: pytest.approx(dict(each), abs=1e-12) for key, each in scores.per_image.items()} == shuffled.per_image


@settings(max_examples=25, deadline=None)
@given(CORPUS)
def test_cider_equals_a_plain_reading_of_its_formula(corpus):
    references, predictions = split(corpus)
    tokens = {key: [caption.split() for caption in captions] for key, captions in references.items()}

    def grams(words, n):
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    def weight(words, n, gram):
        images = sum(any(gram in grams(caption, n) for caption in captions) for captions in tokens.values())
        return grams(words, n).count(gram) * (math.log(len(tokens)) - math.log(max(1, images)))

    def of(candidate, reference, n):
        every = set(grams(candidate, n)) | set(grams(reference, n))
        pairs = [(weight(candidate, n, gram), weight(reference, n, gram)) for gram in every]
        norm = math.sqrt(sum(c * c for c, _ in pairs) * sum(r * r for _, r in pairs))
        delta = max(0, len(candidate) - 1) - max(0, len(reference) - 1)
        return sum(min(c, r) * r for c, r in pairs) / norm * math.exp(-(delta**2) / 72) if norm else 0

    scores = caption_scores(references, predictions, tokenize=False)
    for key, captions in tokens.items():
        candidate = predictions[key].split()
        expected = sum(of(candidate, caption, n) for caption in captions for n in range(1, 5))
        assert scores.cider_per_image[key] == pytest.approx(10 * expected / 4 / len(captions), abs=1e-9)


@pytest.mark.parametrize(
    ("references", "predictions", "message"),
    [
        ({}, {}, "references are empty"),
        ({7: []}, {7: "a"}, "Image 7 has no reference caption"),
        ({7: "a dog"}, {7: "a"}, "image 7 are one text"),
        ({7: [None]}, {7: "a"}, "Image 7 has a reference caption that is not text"),
        ({7: ["a"]}, {7: ["a"]}, r"image 7 is \['a'\], expected one text"),
        ({7: ["a"], 8: ["b"]}, {7: "a"}, r"1 image \(8\) of 2 without a predicted caption"),
        ({7: ["a"]}, {7: "a", "x": "b"}, r"1 predicted caption \('x'\) for an image without references"),
    ],
)
def test_unusable_input_is_refused_with_the_image_named(references, predictions, message):
    with pytest.raises(UserError, match=message):
        caption_scores(references, predictions)


def test_of_many_missing_images_five_are_named():
    with pytest.raises(UserError, match=r"20 images \(0, 1, 2, 3, 4, \.\.\.\) of 20"):
        caption_scores({key: ["a"] for key in range(20)}, {})
