"""Sampled texts follow the model's distribution, those without replacement too, and depend on nothing but themselves and their seed."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vlm.errors import ConfigError
from vlm.model.attention import CrossMemory
from vlm.model.generation import Rules
from vlm.model.sampling import Policy, distinct_samples, sample

Make = Callable[..., Any]
END, B = 3, 4
PROMPTS = torch.tensor([[2, 8, 9, 11, 6], [2, 7, 0, 0, 0], [2, 12, 12, 0, 0], [2, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()


def _generators(rows: Any) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in rows]


def test_sampling_follows_the_distribution_and_its_limits(tiny_decoder: Make) -> None:
    model, count = tiny_decoder(), 4000
    memory = model.memory(1)
    ids, rules = torch.full((count, 1), 2), Rules(end_id=END, max_length=1)

    def frequencies(**settings: Any) -> Tensor:
        out = sample(model, memory, ids, None, rules, Policy(**settings), torch.Generator().manual_seed(0))
        return torch.bincount(torch.tensor([r.ids[0] if r.ids else END for r in out]), minlength=30) / count

    logits = model.logprobs(ids[:1], memory)[0, 0]
    for temperature in (1.0, 0.5):
        chances = (logits / temperature).softmax(0)
        assert (frequencies(temperature=temperature) - chances).abs().max() < 4 * (0.25 / count) ** 0.5
    order = logits.argsort(descending=True)
    assert set(frequencies(top_k=3).nonzero().flatten().tolist()) == set(order[:3].tolist())
    chances = logits.softmax(0)[order]
    nucleus = int((chances.cumsum(0) < 0.5).sum()) + 1
    assert set(frequencies(top_p=0.5).nonzero().flatten().tolist()) == set(order[:nucleus].tolist())


def test_sampling_honours_the_repetition_penalty(tiny_decoder: Make) -> None:
    model, count = tiny_decoder(), 4000
    memory, ids, tolerance = model.memory(1), torch.tensor([[2, 1]]), 4 * (0.25 / count) ** 0.5
    rules = Rules(end_id=END, max_length=1, repetition_penalty=3.0)
    logits = model.language_logits(model.decode_states(ids, memory))[0, -1]
    punished = logits.clone()
    for token in (2, 1):
        punished[token] = logits[token] / 3 if logits[token] > 0 else logits[token] * 3
    assert (punished.softmax(0) - logits.softmax(0)).abs().max() > 3 * tolerance, "else the draws show nothing"
    out = sample(model, memory, ids.repeat(count, 1), None, rules, Policy(), torch.Generator().manual_seed(0))
    drawn = torch.bincount(torch.tensor([r.ids[0] if r.ids else END for r in out]), minlength=30) / count
    assert (drawn - punished.softmax(0)).abs().max() < tolerance


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 1.8, "top_k": 12, "top_p": 0.8}],
)
def test_policies_are_transformers_warpers(settings: dict[str, Any]) -> None:
    policy = Policy(**settings)
    scores = torch.randn(50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(policy.temperature)(None, scores)
    if policy.top_k:
        expected = TopKLogitsWarper(policy.top_k)(None, expected)
    if policy.top_p < 1:
        expected = TopPLogitsWarper(policy.top_p)(None, expected)
    torch.testing.assert_close(policy.log_probabilities(scores), expected.log_softmax(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        *({"temperature": value} for value in (0.0, -1.0, math.inf, math.nan)),
        {"top_k": -1},
        *({"top_p": value} for value in (0.0, 1.1, math.nan)),
    ],
)
def test_wrong_policies_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give 0 < temperature < inf, top_k >= 0 and 0 < top_p <= 1"):
        Policy(**settings)


def _all_texts(model: Any, memory: CrossMemory, policy: Policy, words: list[int]) -> dict[tuple[int, ...], float]:
    """The probability of each text of at most two tokens, the end included."""
    found: dict[tuple[int, ...], float] = {}
    for text in [t for n in range(3) for t in itertools.product(words, repeat=n)]:
        full = [*text, END][:2]
        scores = model.logprobs(torch.tensor([[2, *full]]), memory)[0]
        logs = policy.log_probabilities(scores)
        found[text] = math.exp(sum(logs[i, token].item() for i, token in enumerate(full)))
    return {text: chance for text, chance in found.items() if chance > 0}


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "top_k": 4}])
def test_distinct_samples_are_drawn_without_replacement(tiny_decoder: Make, settings: dict[str, Any]) -> None:
    """The first is drawn from the texts' distribution, the second from that of the others: p(a) p(b) / (1 - p(a)) for each pair in its order."""
    model, times, policy = tiny_decoder(3, vocab=6), 5000, Policy(**settings)
    memory, rules = model.memory(1), Rules(end_id=END, max_length=2)
    chance = _all_texts(model, memory, policy, [0, 1, 2, 4, 5])
    assert sum(chance.values()) == pytest.approx(1)
    drawn = distinct_samples(
        model, memory, torch.full((times, 1), 2), None, rules, policy, 3, _generators(range(times))
    )
    texts = [[tuple(text.ids) for text in row] for row in drawn]
    assert all(len(set(row)) == len(row) == 3 for row in texts)
    firsts, pairs = Counter(row[0] for row in texts), Counter((row[0], row[1]) for row in texts)
    assert max(chance.values()) < 0.9, "else the order shows nothing"
    for text, p in chance.items():
        assert abs(firsts[text] / times - p) < 4.5 * (p * (1 - p) / times) ** 0.5 + 1 / times
    for a, b in itertools.permutations(chance, 2):
        p = chance[a] * chance[b] / (1 - chance[a])
        assert abs(pairs[a, b] / times - p) < 4.5 * (p * (1 - p) / times) ** 0.5 + 1 / times


def test_all_texts_are_found_where_there_are_few(tiny_decoder: Make) -> None:
    model, policy = tiny_decoder(3, vocab=6), Policy(top_k=2)
    memory, rules = model.memory(1), Rules(end_id=END, max_length=2)
    chance = _all_texts(model, memory, policy, [0, 1, 2, 4, 5])
    (found,) = distinct_samples(model, memory, torch.tensor([[2]]), None, rules, policy, 20, _generators([0]))
    assert len(found) == len(chance) < 20
    assert {tuple(text.ids) for text in found} == set(chance)


def test_distinct_samples_keep_to_the_rules(tiny_decoder: Make) -> None:
    """All texts of one or two words, without the empty one and those that say a word twice in a row."""
    model, words = tiny_decoder(3, vocab=6), [0, 1, 2, 4, 5]
    memory, rules = model.memory(1), Rules(end_id=END, max_length=2, min_length=1, no_doubled=True)
    (found,) = distinct_samples(model, memory, torch.tensor([[2]]), None, rules, Policy(), 40, _generators([0]))
    texts = [text for n in (1, 2) for text in itertools.product(words, repeat=n)]
    expected = {text for text in texts if all(a != b for a, b in itertools.pairwise([2, *text]))}
    assert {tuple(text.ids) for text in found} == expected


def test_distinct_samples_do_not_depend_on_the_batch_and_carry_the_models_scores(tiny_decoder: Make) -> None:
    model = tiny_decoder(1)
    memory, rules = model.memory(), Rules(end_id=END, max_length=9, min_length=2, repetition_penalty=1.2)

    def run(memory: CrossMemory, ids: Tensor, mask: Tensor | None, rows: list[int]) -> Any:
        policy = Policy(temperature=1.5, top_p=0.95)
        return distinct_samples(model, memory, ids, mask, rules, policy, 4, _generators(rows))

    together = run(memory, PROMPTS, MASK, [0, 1, 2, 3])
    for row in range(B):
        own, length = memory.select(torch.tensor([row])), int(MASK[row].sum())
        (alone,) = run(own, PROMPTS[row : row + 1, :length], None, [row])
        assert [text.ids for text in together[row]] == [text.ids for text in alone]
        for text, other in zip(together[row], alone, strict=True):
            assert text.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-10)
            produced = text.ids + [END] * (len(text.token_logprobs) - len(text.ids))
            logprobs = model.logprobs(torch.tensor([PROMPTS[row, :length].tolist() + produced]), own)[0]
            expected = [logprobs[length - 1 + i, token].item() for i, token in enumerate(produced)]
            assert text.token_logprobs == pytest.approx(expected, abs=1e-10)
    assert len({tuple(text.ids) for text in together[0]}) == 4


def test_no_prompts_no_samples(tiny_decoder: Make) -> None:
    model, none = tiny_decoder(), torch.zeros(0, 1, dtype=torch.long)
    memory, rules = model.memory(1).select(torch.zeros(0, dtype=torch.long)), Rules(end_id=END, max_length=4)
    assert sample(model, memory, none, None, rules, Policy(), []) == []
    assert distinct_samples(model, memory, none, None, rules, Policy(), 2, []) == []
    with pytest.raises(ConfigError, match="count=0"):
        distinct_samples(model, memory, none, None, rules, Policy(), 0, [])
