"""Decoding equals transformers' generate, an exhaustive search where one is possible, and itself in any other batch."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel

from vlm.config import TextConfig
from vlm.model.attention import CrossMemory, CrossMemoryProjection
from vlm.model.beam_search import beam_search
from vlm.model.convert.bert import from_bert_state_dict
from vlm.model.generation import Generated, Rules, greedy, sample
from vlm.model.ranking import AnswerTree, rank_answers, score_answers
from vlm.model.text_cache import TextCache
from vlm.model.text_transformer import TextTransformer
from vlm.model.vocabulary_head import VocabularyHead

END = 3
B, P, D = 4, 5, 24


@dataclass
class Model:
    """A tiny random decoder with cross-attention, fp64, and transformers' model with the same weights."""

    reference: Any
    transformer: TextTransformer
    projection: CrossMemoryProjection
    head: VocabularyHead

    def new_cache(self, rows: int, max_length: int) -> TextCache:
        return self.transformer.new_cache(rows, max_length)

    def decode_states(
        self, ids: Tensor, memory: CrossMemory, mask: Tensor | None = None, cache: TextCache | None = None
    ) -> Tensor:
        states = self.transformer.embed(ids, 0 if cache is None else cache.offset)
        result: Tensor = self.transformer(states, mask, memory, causal=True, cache=cache)
        return result

    def language_logits(self, states: Tensor) -> Tensor:
        result: Tensor = self.head(states, self.transformer.word_embedding)
        return result

    def logprobs(self, ids: Tensor, memory: CrossMemory) -> Tensor:
        """Without a cache: (R, L, V)."""
        return self.language_logits(self.decode_states(ids, memory)).log_softmax(-1)


def _model(seed: int = 0, vocab: int = 30) -> Model:
    torch.manual_seed(seed)
    shape = {"vocab_size": vocab, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 3}
    more = {"intermediate_size": 32, "max_position_embeddings": 40, "initializer_range": 0.25}
    config = BertConfig(**shape, **more, is_decoder=True, add_cross_attention=True)
    reference = BertLMHeadModel(config).double().eval()
    weights = from_bert_state_dict(reference.state_dict())
    ours = TextConfig(
        vocab_size=vocab, dim=D, heads=3, layers=2, feed_forward_dim=32, max_positions=40, cross_attention=(0, 1)
    )
    parts = TextTransformer(ours), CrossMemoryProjection(2, D, D, 3), VocabularyHead(ours)
    for part, state in zip(parts, (weights.transformer, weights.memory, weights.head), strict=True):
        part.double().eval().requires_grad_(False).load_state_dict(state)
    return Model(reference, *parts)


def _images(rows: int = B) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    return torch.randn(rows, P, D, dtype=torch.float64, generator=g), torch.arange(P) < torch.tensor([5, 3, 4, 5])[
        :rows, None
    ]


def _memory(model: Model, rows: int = B) -> CrossMemory:
    result: CrossMemory = model.projection(*_images(rows))
    return result


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
    {"repetition_penalty": 1.2, "no_repeat_ngram": 3, "min_length": 3, "length_penalty": 0.6},
]


def _split(settings: dict[str, Any]) -> tuple[Rules, float]:
    rules = {name: value for name, value in settings.items() if name != "length_penalty"}
    return Rules(end_id=END, max_length=12, **rules), settings.get("length_penalty", 1.0)


def _transformers(model: Model, ids: Tensor, beams: int, settings: dict[str, Any], **more: Any) -> list[list[int]]:
    rules, length_penalty = _split(settings)
    images, mask = _images(len(ids))
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
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_transformers_generate(settings: dict[str, Any], seed: int) -> None:
    model = _model(seed)
    memory, (rules, length_penalty) = _memory(model), _split(settings)
    for ids in (PROMPTS[:, :1], torch.tensor([[2, 8, 5], [2, 9, 9], [2, 4, 6], [2, 13, 5]])):
        assert _ids(greedy(model, memory, ids, None, rules)) == _transformers(model, ids, 1, settings)
        for exhaustive, stopping in ((False, False), (True, "never")):
            ours = beam_search(model, memory, ids, None, rules, 3, length_penalty, exhaustive)
            assert _ids(ours) == _transformers(model, ids, 3, settings, early_stopping=stopping)


def test_the_settings_above_give_texts_of_several_lengths() -> None:
    lengths = {
        len(r.ids) for s in range(3) for r in beam_search(_model(s), _memory(_model(s)), PROMPTS, MASK, _split({})[0])
    }
    assert len(lengths) >= 3


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_enough_beams_are_an_exhaustive_search(length_penalty: float) -> None:
    """With as many beams as there are texts nothing is pruned: the best of all texts of at most 3 tokens."""
    model = _model(3, vocab=5)
    memory, rules = _memory(model), Rules(end_id=END, max_length=3)
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


def test_one_beam_is_greedy() -> None:
    model = _model()
    memory, rules = _memory(model), Rules(end_id=END, max_length=10, repetition_penalty=1.3, no_repeat_ngram=2)
    assert beam_search(model, memory, PROMPTS, MASK, rules, 1) == greedy(model, memory, PROMPTS, MASK, rules)


@pytest.mark.parametrize("how", ["greedy", "beam", "exhaustive", "sample"])
@pytest.mark.parametrize("seed", [0, 5])
def test_results_do_not_depend_on_the_batch(how: str, seed: int) -> None:
    """Prompts of four lengths, penalties that read the prompt: each text is the same alone."""
    model = _model(seed)
    memory = _memory(model)
    rules = Rules(end_id=END, max_length=12, repetition_penalty=1.2, no_repeat_ngram=3)

    def run(memory: CrossMemory, ids: Tensor, mask: Tensor | None, rows: list[int]) -> list[Generated]:
        if how == "greedy":
            return greedy(model, memory, ids, mask, rules)
        if how == "sample":
            generators = [torch.Generator().manual_seed(row) for row in rows]
            return sample(model, memory, ids, mask, rules, 1.3, top_k=9, top_p=0.9, generator=generators)
        return beam_search(model, memory, ids, mask, rules, 3, exhaustive=how == "exhaustive")

    together = run(memory, PROMPTS, MASK, [0, 1, 2, 3])
    for row in range(B):
        length = int(MASK[row].sum())
        alone = run(memory.select(torch.tensor([row])), PROMPTS[row : row + 1, :length], None, [row])[0]
        assert together[row].ids == alone.ids
        assert together[row].token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-10)


@pytest.mark.parametrize("beams", [1, 3])
def test_scores_are_the_models_own_without_a_cache(beams: int) -> None:
    model = _model(1)
    memory, rules = _memory(model), Rules(end_id=END, max_length=8, repetition_penalty=1.4)
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


def test_prompts_may_share_a_memory_row() -> None:
    """Several questions about one image."""
    model = _model()
    memory, rules = _memory(model, 2), Rules(end_id=END, max_length=10)
    copied = memory.select(torch.tensor([0, 0, 1, 1]))
    for search in (greedy, beam_search):
        assert _ids(search(model, memory, PROMPTS, MASK, rules)) == _ids(search(model, copied, PROMPTS, MASK, rules))


def test_sampling_follows_the_distribution_and_its_limits() -> None:
    model, count = _model(), 4000
    memory = _memory(model, 1)
    ids, rules = torch.full((count, 1), 2), Rules(end_id=END, max_length=1)

    def frequencies(**settings: Any) -> Tensor:
        out = sample(model, memory, ids, None, rules, generator=torch.Generator().manual_seed(0), **settings)
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


def test_sampling_honours_the_repetition_penalty() -> None:
    model = _model()
    memory, ids = _memory(model), torch.full((B, 1), 2)
    rules = Rules(end_id=END, max_length=12, min_length=11, repetition_penalty=1e6)
    for result in sample(model, memory, ids, None, rules, generator=torch.Generator().manual_seed(0)):
        assert len(set(result.ids)) == len(result.ids) == 11


def test_a_row_with_no_token_left_ends() -> None:
    model = _model(0, vocab=6)
    rules = Rules(end_id=END, max_length=12, no_repeat_ngram=1, min_length=8)
    for search in (greedy, beam_search):
        for result in search(model, _memory(model), torch.full((B, 1), 2), None, rules):
            assert len(set(result.ids)) == len(result.ids) <= 4
            assert all(math.isfinite(value) for value in result.token_logprobs)


def test_no_prompts_no_texts() -> None:
    model, none = _model(), torch.zeros(0, 1, dtype=torch.long)
    memory, rules = _memory(model, 1).select(torch.zeros(0, dtype=torch.long)), Rules(end_id=END, max_length=4)
    assert greedy(model, memory, none, None, rules) == beam_search(model, memory, none, None, rules) == []
    assert rank_answers(model, memory, none, None, AnswerTree([[4]], END)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_length": 5, "max_length": 5}, "0 <= min_length < max_length"),
        ({"repetition_penalty": 0.0}, "must be above 0"),
        ({"no_repeat_ngram": -1}, "must not be negative"),
    ],
)
def test_wrong_rules_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rules(**{"end_id": END, "max_length": 9, **settings})


ANSWERS = [[5], [6], [5, 6], [5, 6, 7], [8, 9], [8, 10], [8, 10, 11, 12], [13, 13], [14], []]
ANSWERS += [[a, b] for a in range(15, 22) for b in range(15, 30)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("width", [1, 4, 64])
def test_ranking_equals_brute_force(seed: int, k: int, width: int) -> None:
    model = _model(seed)
    memory, tree = _memory(model), AnswerTree(ANSWERS, END)
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


def test_ranking_all_answers_equals_scoring_them_in_any_batch() -> None:
    model = _model(4)
    memory, tree = _memory(model), AnswerTree(ANSWERS, END)
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


def test_ranking_reads_few_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = _model(0), 0
    memory, tree = _memory(model), AnswerTree(ANSWERS, END)
    decode = Model.decode_states

    def counting(self: Model, ids: Tensor, *arguments: Any) -> Tensor:
        nonlocal rows
        rows += len(ids)
        return decode(self, ids, *arguments)

    monkeypatch.setattr(Model, "decode_states", counting)
    rank_answers(model, memory, PROMPTS, MASK, tree, 1, 4)
    assert rows < B * len(ANSWERS) / 3


def test_answers_must_differ() -> None:
    with pytest.raises(ValueError, match=r"answers 0 and 2 have the same tokens \[5\]"):
        AnswerTree([[5], [6], [5]], END)
    with pytest.raises(ValueError, match="list of answers is empty"):
        AnswerTree([], END)
