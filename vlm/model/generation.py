"""Greedy decoding with caches, and what sampling, beam search and answer ranking share with it.

Letters: B prompts, R rows that are decoded together, L tokens of the longest prompt, V vocabulary, N history so far.

Prompts of several lengths stand in one batch, padded at their ends: the padding stays in the cache as holes, and each row counts its own positions,
so no result depends on what else is in the batch. Rows that have ended leave the batch as soon as half of it has.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from vlm.model.attention import CrossMemory
from vlm.model.limits import Limits
from vlm.model.text_cache import TextCache


class Decoder(Protocol):
    """What decoding needs of a model; `VisionLanguageModel` is one."""

    def new_cache(self, rows: int, max_length: int) -> TextCache:
        """An empty cache for R rows of up to max_length tokens."""
        ...

    def decode_states(
        self, ids: Tensor, memory: CrossMemory, mask: Tensor | None = None, cache: TextCache | None = None
    ) -> Tensor:
        """Causal states (R, L, D) of `ids` (R, L), which follow the cache's positions. memory: of R rows, or of a divisor of R."""
        ...

    def language_logits(self, states: Tensor) -> Tensor:
        """(..., D) states to (..., V) logits of the next token."""
        ...


@dataclass(frozen=True)
class Generated:
    """One produced text.

    ids: the tokens after the prompt, without the end token. token_logprobs: the model's own log-probabilities of these tokens and, where the text
    ended by itself, of the end token; no penalty enters here. key: what the search compared, 0 where nothing was compared.
    """

    ids: list[int]
    token_logprobs: list[float]
    key: float = 0.0

    @property
    def score(self) -> float:
        """Log-probability of the text given the prompt."""
        return math.fsum(self.token_logprobs)

    @property
    def probability(self) -> float:
        """Of the whole text, its end included: an answer's confidence."""
        return math.exp(self.score)

    @property
    def confidence(self) -> float:
        """Geometric mean of the words' probabilities: a caption's confidence; 0 for a text without words."""
        words = self.token_logprobs[: len(self.ids)]
        return math.exp(math.fsum(words) / len(words)) if words else 0.0


@dataclass(frozen=True, kw_only=True)
class Rules(Limits):
    """Limits that tensors of scores are kept to."""

    @cached_property
    def _endings(self) -> list[tuple[Tensor, Tensor]]:
        """The banned sequences of each length S: all tokens but the last (N, S - 1), and the last (N,)."""
        groups = [[s for s in self.banned if len(s) == size] for size in sorted({len(s) for s in self.banned})]
        return [
            (torch.tensor([s[:-1] for s in group], dtype=torch.long), torch.tensor([s[-1] for s in group]))
            for group in groups
        ]

    def apply(self, scores: Tensor, history: Tensor, produced: int) -> Tensor:
        """Scores (R, V) with -inf where a token is forbidden. history: (R, N), -1 before a row's first token. produced: tokens after the prompt."""
        vocabulary, size = scores.shape[1], self.no_repeat_ngram
        if self.repetition_penalty != 1:
            penalty = self.repetition_penalty
            punished = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(_flags(history, vocabulary), punished, scores)
        allowed_end = scores[:, self.end_id]
        if size and history.shape[1] >= size:
            # An n-gram would be completed by the next token if it starts with the history's last size - 1 tokens.
            windows = history.unfold(1, size, 1)
            repeats = (windows[..., :-1] == history[:, None, history.shape[1] - size + 1 :]).all(-1)
            scores = scores.masked_fill(_flags(windows[..., -1].masked_fill(~repeats, -1), vocabulary), -math.inf)
        if self.no_doubled and history.shape[1]:
            scores = scores.masked_fill(_flags(history[:, -1:], vocabulary), -math.inf)
        for begin, last in self._endings:
            if history.shape[1] >= begin.shape[1]:
                tail = history[:, None, history.shape[1] - begin.shape[1] :]
                met = (tail == begin.to(history.device)).all(-1)
                scores = scores.masked_fill(_flags(last.to(history.device).where(met, -1), vocabulary), -math.inf)
        if produced < self.min_length:
            scores = scores.index_fill(1, torch.tensor(self.end_id, device=scores.device), -math.inf)
        if size or self.no_doubled or self.banned:
            stuck = (scores == -math.inf).all(1)
            end = torch.where(stuck, allowed_end, scores[:, self.end_id])
            scores = scores.index_copy(1, torch.tensor([self.end_id], device=scores.device), end[:, None])
        return scores


def _flags(tokens: Tensor, vocabulary: int) -> Tensor:
    """(R, N) tokens, -1 for none -> (R, V) bool: which occur."""
    flags = torch.zeros(len(tokens), vocabulary + 1, dtype=torch.bool, device=tokens.device)
    return flags.scatter_(1, tokens.masked_fill(tokens < 0, vocabulary), True)[:, :vocabulary]


def exact_logits(model: Decoder, states: Tensor) -> Tensor:
    """Logits in fp32, or fp64 where the model computes in it."""
    logits = model.language_logits(states)
    return logits if logits.dtype == torch.float64 else logits.float()


def read_prompt(
    model: Decoder, memory: CrossMemory, ids: Tensor, mask: Tensor | None, max_new: int
) -> tuple[Tensor, TextCache]:
    """Logits (B, V) of the token after each prompt, and a cache with room for max_new more.

    ids: (B, L), first token included. mask: (B, L), true at tokens, which come first in each row; None for equally long prompts.
    """
    if mask is not None and bool(mask.all()):
        mask = None
    cache = model.new_cache(len(ids), ids.shape[1] + max_new)
    states = model.decode_states(ids, memory, mask, cache)
    if mask is None:
        return exact_logits(model, states[:, -1]), cache
    last = mask.sum(1) - 1
    return exact_logits(model, states[torch.arange(len(ids), device=ids.device), last]), cache


def next_logits(model: Decoder, memory: CrossMemory, tokens: Tensor, cache: TextCache) -> Tensor:
    """Logits (R, V) after one more token (R,) in each row."""
    return exact_logits(model, model.decode_states(tokens[:, None], memory, None, cache)[:, -1])


def kept_memory(memory: CrossMemory, kept: Tensor, rows: int) -> CrossMemory:
    """The memory of the rows `kept`, one each, of `rows` that may have shared it."""
    return memory.select(kept // (rows // len(memory)))


def aligned_history(ids: Tensor, mask: Tensor | None) -> Tensor:
    """The prompts (B, L) moved to the right, -1 before them, so that what is produced follows each without a gap."""
    if mask is None:
        return ids
    length = ids.shape[1]
    source = torch.arange(length, device=ids.device) - (length - mask.sum(1, keepdim=True))
    return ids.gather(1, source.clamp(min=0)).masked_fill(source < 0, -1)


def cut(tokens: Tensor, logprobs: Tensor, end_id: int, keys: Sequence[float] | None = None) -> list[Generated]:
    """Rows (R, M) of tokens and their log-probabilities up to the first end token."""
    results = []
    for row, (ids, values) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
        words = ids.index(end_id) if end_id in ids else len(ids)
        results.append(Generated(ids[:words], values[: words + 1], 0.0 if keys is None else keys[row]))
    return results


Choose = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def decode(
    model: Decoder, memory: CrossMemory, ids: Tensor, mask: Tensor | None, rules: Rules, choose: Choose
) -> list[Generated]:
    """One text for each prompt. ids, mask: as `read_prompt` takes them. `choose(scores (R, V), rows (R,))` picks the next token (R,) of the prompts
    `rows`."""
    if len(ids) == 0:
        return []
    logits, cache = read_prompt(model, memory, ids, mask, rules.max_length)
    history = aligned_history(ids, mask)
    rows = torch.arange(len(ids), device=ids.device)
    tokens = torch.full((len(ids), rules.max_length), rules.end_id, device=ids.device)
    logprobs = logits.new_zeros(tokens.shape)
    for produced in range(rules.max_length):
        token = choose(rules.apply(logits, history, produced), rows)
        tokens[rows, produced] = token
        logprobs[rows, produced] = logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(1)
        running = (token != rules.end_id) & ~(tokens[rows, :produced] == rules.end_id).any(1)
        left = int(running.sum())
        if left == 0 or produced + 1 == rules.max_length:
            break
        history = torch.cat([history, token[:, None]], dim=1)
        if left * 2 <= len(rows):
            kept = running.nonzero().squeeze(1)
            memory = kept_memory(memory, kept, len(rows))
            cache, rows, token, history = cache.select(kept), rows[kept], token[kept], history[kept]
        logits = next_logits(model, memory, token, cache)
    return cut(tokens, logprobs, rules.end_id)


def greedy(model: Decoder, memory: CrossMemory, ids: Tensor, mask: Tensor | None, rules: Rules) -> list[Generated]:
    """The likeliest next token each time. ids, mask: prompts as `read_prompt` takes them; memory: of B rows, or of a divisor of B."""
    return decode(model, memory, ids, mask, rules, lambda scores, _: scores.argmax(1))
