"""Ranking a list of answers is exact: it equals scoring each answer without a cache, in any batch."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.model.ranking import AnswerTree, rank_answers, score_answers

Make = Callable[..., Any]
END, B = 3, 4
PROMPTS = torch.tensor([[2, 8, 9, 11, 6], [2, 7, 0, 0, 0], [2, 12, 12, 0, 0], [2, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
ANSWERS = [[5], [6], [5, 6], [5, 6, 7], [8, 9], [8, 10], [8, 10, 11, 12], [13, 13], [14], []]
ANSWERS += [[a, b] for a in range(15, 22) for b in range(15, 30)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("width", [1, 4, 64])
def test_ranking_equals_brute_force(tiny_decoder: Make, seed: int, k: int, width: int) -> None:
    model = tiny_decoder(seed)
    memory, tree = model.memory(), AnswerTree(ANSWERS, END)
    ranked = rank_answers(model, memory, PROMPTS, MASK, tree, k, width)
    for row, results in enumerate(ranked):
        prompt, own = PROMPTS[row][MASK[row]].tolist(), memory.select(torch.tensor([row]))
        scores = []
        for answer in ANSWERS:
            logprobs = model.logprobs(torch.tensor([[*prompt, *answer, END]]), own)[0]
            scores.append(sum(logprobs[len(prompt) - 1 + i, t].item() for i, t in enumerate([*answer, END])))
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
        assert [r.answer for r in results] == best
        assert [r.score for r in results] == pytest.approx([scores[i] for i in best], abs=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_ranking_a_long_list_equals_scoring_all_of_it(tiny_decoder: Make, seed: int) -> None:
    """300 random answers of 1 to 4 tokens: many prefixes are nearly as likely as the best answers, so a search that stops too early misses some."""
    model, rng = tiny_decoder(seed), random.Random(seed)
    drawn = (tuple(rng.randrange(4, 30) for _ in range(rng.randrange(1, 5))) for _ in range(300))
    memory, tree = model.memory(), AnswerTree(list(dict.fromkeys(drawn)), END)
    scores = score_answers(model, memory, PROMPTS, MASK, tree)
    for k, width in itertools.product((1, 5), (1, 4, 16)):
        expected = scores.topk(k, dim=1)
        ranked = rank_answers(model, memory, PROMPTS, MASK, tree, k, width)
        assert [[r.answer for r in results] for results in ranked] == expected.indices.tolist(), (k, width)
        found = torch.tensor([[r.score for r in results] for results in ranked], dtype=scores.dtype)
        torch.testing.assert_close(found, expected.values, rtol=0, atol=1e-10)


def test_ranking_all_answers_equals_scoring_them_in_any_batch(tiny_decoder: Make) -> None:
    model = tiny_decoder(4)
    memory, tree = model.memory(), AnswerTree(ANSWERS, END)
    scores = score_answers(model, memory, PROMPTS, MASK, tree)
    chunked = score_answers(model, memory, PROMPTS, MASK, tree, rows=20)
    torch.testing.assert_close(chunked, scores, rtol=0, atol=1e-12)
    for row, results in enumerate(rank_answers(model, memory, PROMPTS, MASK, tree, k=10**6)):
        expected = scores[row].sort(descending=True)
        assert [r.answer for r in results] == expected.indices.tolist()
        assert [r.score for r in results] == pytest.approx(expected.values.tolist(), abs=1e-10)
        length = int(MASK[row].sum())
        alone = score_answers(model, memory.select(torch.tensor([row])), PROMPTS[row : row + 1, :length], None, tree)
        torch.testing.assert_close(alone[0], scores[row], rtol=0, atol=1e-12)


def test_ranking_reads_few_prefixes(tiny_decoder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_decoder(0), 0
    memory, tree = model.memory(), AnswerTree(ANSWERS, END)
    decode = type(model).decode_states

    def counting(self: Any, ids: Tensor, *arguments: Any) -> Tensor:
        nonlocal rows
        rows += len(ids)
        return decode(self, ids, *arguments)

    monkeypatch.setattr(type(model), "decode_states", counting)
    rank_answers(model, memory, PROMPTS, MASK, tree, 1, 4)
    assert rows < B * len(ANSWERS) / 3


def test_answers_must_differ() -> None:
    with pytest.raises(ValueError, match=r"answers 0 and 2 have the same tokens \[5\]"):
        AnswerTree([[5], [6], [5]], END)
    with pytest.raises(ValueError, match="list of answers is empty"):
        AnswerTree([], END)
