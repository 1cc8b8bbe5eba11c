"""Decoding equals transformers' generate, an exhaustive search where one is possible, and itself in any other batch."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.model.attention import CrossMemory
from vlm.model.beam_search import beam_search, best_texts
from vlm.model.generation import Generated, Rules, greedy
from vlm.model.ranking import AnswerTree, rank_answers
from vlm.model.sampling import Policy, sample

Make = Callable[..., Any]
END, B = 3, 4
PROMPTS = torch.tensor([[2, 8, 9, 11, 6], [2, 7, 0, 0, 0], [2, 12, 12, 0, 0], [2, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
SETTINGS = [
    {},
    {"length_penalty": 0.0},
    {"length_penalty": 2.0, "min_length": 4},
    {"length_penalty": -1.0},
    {"min_length": 6},
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram": 2},
    {"no_doubled": True},
    {"no_doubled": True, "no_repeat_ngram": 3, "length_penalty": 0.5},
    {"repetition_penalty": 1.2, "no_repeat_ngram": 3, "min_length": 3, "length_penalty": 0.6},
    {"banned": tuple((i,) for i in range(4, 30, 2))},
    {"banned": (*((i, j) for i in range(30) for j in range(4, 30) if (i + j) % 3), (8, 5, 9), (17,)), "min_length": 3},
]


def _split(settings: dict[str, Any]) -> tuple[Rules, float]:
    rules = {name: value for name, value in settings.items() if name != "length_penalty"}
    return Rules(end_id=END, max_length=12, **rules), settings.get("length_penalty", 1.0)


def _transformers(model: Any, ids: Tensor, beams: int, settings: dict[str, Any], **more: Any) -> list[list[int]]:
    rules, length_penalty = _split(settings)
    banned = [list(sequence) for sequence in rules.banned] + [[i, i] for i in range(30) if rules.no_doubled]
    images, mask = model.images(len(ids))
    if beams > 1:
        more = {"length_penalty": length_penalty, **more}
    out = model.reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        encoder_hidden_states=images,
        encoder_attention_mask=mask.long(),
        num_beams=beams,
        do_sample=False,
        max_new_tokens=rules.max_length,
        min_new_tokens=rules.min_length,
        repetition_penalty=rules.repetition_penalty,
        no_repeat_ngram_size=rules.no_repeat_ngram,
        bad_words_ids=banned or None,
        eos_token_id=END,
        pad_token_id=0,
        use_cache=False,
        **more,
    )
    texts = [row[ids.shape[1] :] for row in out.tolist()]
    return [row[: row.index(END)] if END in row else row for row in texts]


def _ids(results: list[Generated]) -> list[list[int]]:
    return [result.ids for result in results]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
def test_equals_transformers_generate(tiny_decoder: Make, settings: dict[str, Any], seed: int) -> None:
    model = tiny_decoder(seed)
    memory, (rules, length_penalty) = model.memory(), _split(settings)
    for ids in (PROMPTS[:, :1], torch.tensor([[2, 8, 5], [2, 9, 9], [2, 4, 6], [2, 13, 5]])):
        assert _ids(greedy(model, memory, ids, None, rules)) == _transformers(model, ids, 1, settings)
        for exhaustive, stopping in ((False, False), (True, "never")):
            ours = beam_search(model, memory, ids, None, rules, 3, length_penalty, exhaustive)
            assert _ids(ours) == _transformers(model, ids, 3, settings, early_stopping=stopping)


@pytest.mark.parametrize(("seed", "length_penalty"), [(1, -1.0), (4, -1.0), (4, -0.5)])
def test_an_exhaustive_search_goes_on_while_a_longer_text_may_win(
    tiny_decoder: Make, seed: int, length_penalty: float
) -> None:
    """A negative exponent favours short texts, so the next length bounds what can come; the greatest would bound it too low, which shows where a
    model is as sure as one of sharpened embeddings."""
    model = tiny_decoder(seed, vocab=8)
    for embedding in (model.transformer.word_embedding, model.reference.get_input_embeddings().weight):
        embedding.data.mul_(6)
    ids, settings = torch.full((B, 1), 2), {"length_penalty": length_penalty}
    found = beam_search(model, model.memory(), ids, None, _split(settings)[0], 3, length_penalty, exhaustive=True)
    assert _ids(found) == _transformers(model, ids, 3, settings, early_stopping="never")


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3], SETTINGS[7], SETTINGS[8]], ids=range(4))
@pytest.mark.parametrize("seed", [0, 1])
def test_several_texts_equal_transformers_generate(tiny_decoder: Make, settings: dict[str, Any], seed: int) -> None:
    model, ids = tiny_decoder(seed), torch.tensor([[2, 8, 5], [2, 9, 9], [2, 4, 6], [2, 13, 5]])
    memory, (rules, length_penalty) = model.memory(), _split(settings)
    for count in (2, 4):
        found = best_texts(model, memory, ids, None, rules, 4, length_penalty, count=count)
        expected = _transformers(model, ids, 4, settings, num_return_sequences=count)
        assert [text.ids for texts in found for text in texts] == expected
        assert all(texts == sorted(texts, key=lambda text: -text.key) for texts in found)


def test_several_texts_are_the_best_of_an_exhaustive_search(tiny_decoder: Make) -> None:
    """Where nothing is pruned the k best are the first k of all texts by their scores, and asking for more changes none of them."""
    model = tiny_decoder(3, vocab=5)
    memory, rules, ids = model.memory(), Rules(end_id=END, max_length=3), torch.full((B, 1), 2)
    everything = best_texts(model, memory, ids, None, rules, 5**3, exhaustive=True, count=5**3)
    few = best_texts(model, memory, ids, None, rules, 5**3, exhaustive=True, count=7)
    assert [[t.ids for t in texts[:7]] for texts in everything] == [[t.ids for t in texts] for texts in few]
    for texts in everything:  # with 4 words and an end: texts of 0 to 2 words, and of 3 without an end
        assert len({tuple(text.ids) for text in texts}) == len(texts) == 1 + 4 + 4**2 + 4**3
        assert sum(text.probability for text in texts) == pytest.approx(1)


def test_the_settings_above_give_texts_of_several_lengths(tiny_decoder: Make) -> None:
    lengths = {
        len(r.ids)
        for s in range(3)
        for r in beam_search(tiny_decoder(s), tiny_decoder(s).memory(), PROMPTS, MASK, _split({})[0])
    }
    assert len(lengths) >= 3


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_enough_beams_are_an_exhaustive_search(tiny_decoder: Make, length_penalty: float) -> None:
    """With as many beams as there are texts nothing is pruned: the best of all texts of at most 3 tokens."""
    model = tiny_decoder(3, vocab=5)
    memory, rules = model.memory(), Rules(end_id=END, max_length=3)
    ids = torch.full((B, 1), 2)
    results = beam_search(model, memory, ids, None, rules, 5**3, length_penalty, exhaustive=True)
    words = [t for t in range(5) if t != END]
    texts = [t for n in range(4) for t in itertools.product(words, repeat=n)]
    for row, result in enumerate(results):
        own = memory.select(torch.tensor([row]))

        def key(text: tuple[int, ...], own: CrossMemory = own) -> float:
            full = [*text, END][:3]
            logprobs = model.logprobs(torch.tensor([[2, *full]]), own)[0]
            return sum(logprobs[i, t].item() for i, t in enumerate(full)) / len(full) ** length_penalty

        best = max(texts, key=key)
        assert result.ids == list(best)
        assert result.key == pytest.approx(key(best), abs=1e-10)


def test_one_beam_is_greedy(tiny_decoder: Make) -> None:
    model = tiny_decoder()
    memory, rules = model.memory(), Rules(end_id=END, max_length=10, repetition_penalty=1.3, no_repeat_ngram=2)
    assert beam_search(model, memory, PROMPTS, MASK, rules, 1) == greedy(model, memory, PROMPTS, MASK, rules)


@pytest.mark.parametrize("how", ["greedy", "beam", "exhaustive", "sample"])
@pytest.mark.parametrize("seed", [0, 5])
def test_results_do_not_depend_on_the_batch(tiny_decoder: Make, how: str, seed: int) -> None:
    """Prompts of four lengths, penalties that read the prompt: each text is the same alone."""
    model = tiny_decoder(seed)
    memory = model.memory()
    rules = Rules(end_id=END, max_length=12, repetition_penalty=1.2, no_repeat_ngram=3)

    def run(memory: CrossMemory, ids: Tensor, mask: Tensor | None, rows: list[int]) -> list[Generated]:
        if how == "greedy":
            return greedy(model, memory, ids, mask, rules)
        if how == "sample":
            generators = [torch.Generator().manual_seed(row) for row in rows]
            policy = Policy(temperature=1.3, top_k=9, top_p=0.9)
            return sample(model, memory, ids, mask, rules, policy, generators)
        return beam_search(model, memory, ids, mask, rules, 3, exhaustive=how == "exhaustive")

    together = run(memory, PROMPTS, MASK, [0, 1, 2, 3])
    for row in range(B):
        length = int(MASK[row].sum())
        alone = run(memory.select(torch.tensor([row])), PROMPTS[row : row + 1, :length], None, [row])[0]
        assert together[row].ids == alone.ids
        assert together[row].token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-10)


@pytest.mark.parametrize("beams", [1, 3])
def test_scores_are_the_models_own_without_a_cache(tiny_decoder: Make, beams: int) -> None:
    model = tiny_decoder(1)
    memory, rules = model.memory(), Rules(end_id=END, max_length=8, repetition_penalty=1.4)
    for row, result in enumerate(beam_search(model, memory, PROMPTS, MASK, rules, beams)):
        prompt = PROMPTS[row][MASK[row]].tolist()
        produced = result.ids + [END] * (len(result.token_logprobs) - len(result.ids))
        logprobs = model.logprobs(torch.tensor([prompt + produced]), memory.select(torch.tensor([row])))[0]
        expected = [logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(produced)]
        assert result.token_logprobs == pytest.approx(expected, abs=1e-10)
        assert result.score == pytest.approx(sum(expected), abs=1e-10)


def test_confidence_is_the_words_geometric_mean() -> None:
    text = Generated([5, 6], [math.log(0.5), math.log(0.125), math.log(0.1)])
    assert text.confidence == pytest.approx(0.25)
    assert text.probability == pytest.approx(0.00625)
    assert Generated([], [math.log(0.9)]).confidence == 0.0


def test_prompts_may_share_a_memory_row(tiny_decoder: Make) -> None:
    """Several questions about one image."""
    model = tiny_decoder()
    memory, rules = model.memory(2), Rules(end_id=END, max_length=10)
    copied = memory.select(torch.tensor([0, 0, 1, 1]))
    for search in (greedy, beam_search):
        assert _ids(search(model, memory, PROMPTS, MASK, rules)) == _ids(search(model, copied, PROMPTS, MASK, rules))


def test_a_row_with_no_token_left_ends(tiny_decoder: Make) -> None:
    model = tiny_decoder(0, vocab=6)
    rules = Rules(end_id=END, max_length=12, no_repeat_ngram=1, min_length=8)
    for search in (greedy, beam_search):
        for result in search(model, model.memory(), torch.full((B, 1), 2), None, rules):
            assert len(set(result.ids)) == len(result.ids) <= 4
            assert all(math.isfinite(value) for value in result.token_logprobs)


def test_no_prompts_no_texts(tiny_decoder: Make) -> None:
    model, none = tiny_decoder(), torch.zeros(0, 1, dtype=torch.long)
    memory, rules = model.memory(1).select(torch.zeros(0, dtype=torch.long)), Rules(end_id=END, max_length=4)
    assert greedy(model, memory, none, None, rules) == beam_search(model, memory, none, None, rules) == []
    assert rank_answers(model, memory, none, None, AnswerTree([[4]], END)) == []


def test_a_row_whose_every_token_is_banned_ends(tiny_decoder: Make) -> None:
    model = tiny_decoder()
    rules = Rules(end_id=END, max_length=6, min_length=4, banned=tuple((8, i) for i in range(30)))
    for search in (greedy, beam_search):
        (found,) = search(model, model.memory(1), torch.tensor([[2, 8]]), None, rules)
        assert found.ids == []
        assert math.isfinite(found.score)
