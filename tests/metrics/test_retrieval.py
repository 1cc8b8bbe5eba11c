"""Recall at k from a matrix of similarities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.metrics import retrieval
from vlm.metrics.retrieval import retrieval_scores


def brute_force(similarity, queries, results, k):
    hits = 0
    for row, query in zip(similarity, queries, strict=True):
        order = sorted(range(len(results)), key=lambda m: (-row[m], results[m] == query))  # ties: the wrong ones first
        hits += any(results[m] == query for m in order[:k])
    return 100 * hits / len(queries)


def test_several_captions_an_image_any_of_them_is_right():
    similarity = [[0.1, 0.9, 0.5, 0.0], [0.8, 0.7, 0.6, 0.2]]
    scores = retrieval_scores(similarity, [10, 20], [10, 10, 20, 20], ks=(1, 3))
    assert scores.image_to_text == {k: 100 * float((scores.image_ranks < k).mean()) for k in (1, 3)}
    assert scores.text_to_image == {k: 100 * float((scores.text_ranks < k).mean()) for k in (1, 3)}
    assert scores.image_to_text == {1: 50.0, 3: 100.0}
    assert scores.text_to_image == {1: 75.0, 3: 100.0}
    assert scores.mean == pytest.approx((50 + 100 + 75 + 100) / 4)


def test_a_model_that_cannot_tell_gets_nothing_at_one():
    scores = retrieval_scores(np.zeros((4, 8)), np.arange(4), np.repeat(np.arange(4), 2))
    assert scores.image_to_text == {1: 0.0, 5: 0.0, 10: 100.0}
    assert scores.text_to_image == {1: 0.0, 5: 100.0, 10: 100.0}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equals_sorting_every_row(data):
    count = data.draw(st.integers(1, 6))
    texts = data.draw(st.permutations([n for n in range(count) for _ in range(data.draw(st.integers(1, 3)))]))
    values = st.one_of(st.integers(-2, 2), st.sampled_from([-np.inf, np.inf, 0.5]))
    similarity = np.array([[float(data.draw(values)) for _ in texts] for _ in range(count)])
    scores = retrieval_scores(similarity, range(count), texts, ks=(1, 2, 5))
    for k in (1, 2, 5):
        assert scores.image_to_text[k] == pytest.approx(brute_force(similarity, range(count), texts, k))
        assert scores.text_to_image[k] == pytest.approx(brute_force(similarity.T, texts, range(count), k))


def test_rows_taken_in_parts_and_any_order_give_the_same(monkeypatch):
    generator = np.random.default_rng(0)
    similarity, texts = generator.normal(size=(7, 20)).astype(np.float16), generator.permutation(np.arange(20) % 7)
    whole = retrieval_scores(similarity, np.arange(7), texts)
    monkeypatch.setattr(retrieval, "_ROWS", 3)
    assert retrieval_scores(similarity, np.arange(7), texts) == whole
    order = generator.permutation(20)
    assert retrieval_scores(similarity[:, order], np.arange(7), texts[order]) == whole


@pytest.mark.parametrize(
    ("similarity", "images", "texts", "ks", "message"),
    [
        (np.zeros((2, 3)), [1, 2, 3], [1, 2], (1,), r"similarity has shape \(2, 3\), image_ids \(3,\)"),
        (np.zeros((0, 0)), [], [], (1,), "not empty"),
        (np.zeros((2, 1)), [1, 2], [1], (1,), "the image with id 2 has no text"),
        (np.zeros((1, 2)), [1], [1, 2], (1,), "the text with id 2 has no image"),
        (np.full((1, 1), np.nan), [1], [1], (1,), "NaN in image rows 0 to 0"),
        (np.zeros((1, 1)), [1], [1], (0,), "numbers of 1 and above"),
    ],
)
def test_unusable_input_is_refused(similarity, images, texts, ks, message):
    with pytest.raises(ValueError, match=message):
        retrieval_scores(similarity, images, texts, ks)
