"""Beam search with caches; the n beams of a prompt share its memory without copying it.

Letters: B prompts, n beams, L tokens of the longest prompt, V vocabulary, M tokens produced at most.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.errors import ConfigError
from vlm.model.attention import CrossMemory
from vlm.model.generation import (
    Decoder,
    Generated,
    Rules,
    aligned_history,
    cut,
    greedy,
    kept_memory,
    next_logits,
    read_prompt,
)
from vlm.model.limits import check_search


@dataclass
class _Texts:
    """Some texts of each prompt. tokens: (B, n, M). logprobs: (B, n, M), the model's own. scores: (B, n), what is compared; -inf: there is none."""

    tokens: Tensor
    logprobs: Tensor
    scores: Tensor

    def take(self, index: Tensor) -> "_Texts":
        """For each prompt the texts index (B, k), in that order."""
        wide = index[..., None].expand(-1, -1, self.tokens.shape[2])
        return _Texts(self.tokens.gather(1, wide), self.logprobs.gather(1, wide), self.scores.gather(1, index))

    def rows(self, kept: Tensor) -> "_Texts":
        """The prompts `kept` only."""
        return _Texts(self.tokens[kept], self.logprobs[kept], self.scores[kept])

    @staticmethod
    def best(one: "_Texts", other: "_Texts", count: int) -> "_Texts":
        """The `count` best of both, best first."""
        both = _Texts(
            torch.cat([one.tokens, other.tokens], 1),
            torch.cat([one.logprobs, other.logprobs], 1),
            torch.cat([one.scores, other.scores], 1),
        )
        return both.take(both.scores.topk(count, dim=1).indices)


def beam_search(
    model: Decoder,
    memory: CrossMemory,
    ids: Tensor,
    mask: Tensor | None,
    rules: Rules,
    beams: int = 3,
    length_penalty: float = 1.0,
    exhaustive: bool = False,
) -> list[Generated]:
    """For each prompt the finished text with the largest sum of log-probabilities / length ** length_penalty that the search meets.

    ids, mask: prompts as `read_prompt` takes them. memory: of B rows, or of a divisor of B. One beam is `greedy`. The results are those of
    transformers' `generate`: penalties act on log-probabilities, the length counts the produced tokens and the end, and of 2 n candidates the
    first n may finish.

    exhaustive: False stops a prompt when n texts are finished and the best running one is worse at its present length (transformers'
    default); True stops exactly when no running text can beat the best finished one any more (its `early_stopping="never"`).
    """
    return [best for best, *_ in best_texts(model, memory, ids, mask, rules, beams, length_penalty, exhaustive)]


@torch.no_grad()
def best_texts(
    model: Decoder,
    memory: CrossMemory,
    ids: Tensor,
    mask: Tensor | None,
    rules: Rules,
    beams: int = 3,
    length_penalty: float = 1.0,
    exhaustive: bool = False,
    count: int = 1,
) -> list[list[Generated]]:
    """As `beam_search`, for each prompt the `count` best texts, best first: transformers' `num_return_sequences`. Fewer where there are no more.

    Raises:
        ConfigError: unusable beams or length_penalty, or fewer beams than the texts asked for.
    """
    check_search(beams, length_penalty)
    if not 1 <= count <= beams:
        raise ConfigError(
            f"beams={beams} find at most {beams} texts, {count} were asked for; give beams={max(count, 1)}."
        )
    if beams == 1:
        return [[text] for text in greedy(model, memory, ids, mask, rules)]
    if len(ids) == 0:
        return []
    # A float, as a length to a whole power may be more than an integer tensor holds.
    search = _Search(rules, beams, float(length_penalty), exhaustive, count)
    logits, cache = read_prompt(model, memory, ids, mask, rules.max_length)
    prompts = torch.arange(len(ids), device=ids.device)
    first = prompts.repeat_interleave(beams)
    logits, history, cache = logits[first], aligned_history(ids, mask)[first], cache.select(first)
    running, finished = (_none_yet(len(ids), beams, rules, logits) for _ in range(2))
    running.scores[:, 0] = 0.0
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    results: dict[int, list[Generated]] = {}
    for produced in range(rules.max_length):
        parents, running, finished = search.advance(logits, history, running, finished, done, produced)
        done = done | search.settled(running, finished, produced + 1)
        settled = int(done.sum())
        if settled == len(done) or produced + 1 == rules.max_length:
            break
        if settled * 2 >= len(done):
            results |= _results(prompts[done], finished.rows(done), rules, count)
            kept = (~done).nonzero().squeeze(1)
            memory = kept_memory(memory, kept, len(done))
            running, finished, parents = running.rows(kept), finished.rows(kept), parents[kept]
            prompts, done = prompts[kept], done[kept]
            cache = cache.select(parents.flatten())
        else:
            cache.reorder(parents.flatten())
        token = running.tokens[:, :, produced].flatten()
        history = torch.cat([history[parents.flatten()], token[:, None]], dim=1)
        logits = next_logits(model, memory, token, cache)
    results |= _results(prompts, finished, rules, count)
    return [results[i] for i in range(len(ids))]


@dataclass(frozen=True)
class _Search:
    """One step of the search, and when it may stop."""

    rules: Rules
    beams: int
    length_penalty: float
    exhaustive: bool
    count: int

    def advance(
        self, logits: Tensor, history: Tensor, running: _Texts, finished: _Texts, done: Tensor, produced: int
    ) -> tuple[Tensor, _Texts, _Texts]:
        """The rows (B, n) that live on, the running and the finished texts after one more token. logits: (B * n, V)."""
        prompts, beams, vocabulary = len(done), self.beams, logits.shape[1]
        own = logits.log_softmax(1)
        totals = self.rules.apply(own, history, produced).view(prompts, beams, vocabulary) + running.scores[:, :, None]
        # Each beam can end once, so 2 n candidates leave n that run on.
        scores, index = totals.flatten(1).topk(min(2 * beams, beams * vocabulary), dim=1)
        parent, token = index // vocabulary, index % vocabulary
        grown = running.take(parent)
        grown.tokens[:, :, produced] = token
        grown.logprobs[:, :, produced] = own.view(prompts, -1).gather(1, index)
        ends = token == self.rules.end_id
        over = produced + 1 == self.rules.max_length
        may_finish = (ends | over) & ~done[:, None]
        may_finish[:, beams:] = False
        normed = scores / (produced + 1) ** self.length_penalty
        finished = _Texts.best(
            finished, _Texts(grown.tokens, grown.logprobs, normed.masked_fill(~may_finish, -math.inf)), beams
        )
        going = scores.masked_fill(ends, -math.inf)
        chosen = going.topk(beams, dim=1).indices
        running = _Texts(grown.tokens, grown.logprobs, going).take(chosen)
        rows = parent.gather(1, chosen) + torch.arange(prompts, device=parent.device)[:, None] * beams
        return rows, running, finished

    def settled(self, running: _Texts, finished: _Texts, produced: int) -> Tensor:
        """(B,) bool: prompts whose finished texts stand. Sums of log-probabilities only fall, which bounds what can still come."""
        best = running.scores[:, 0]
        settled: Tensor
        if self.exhaustive:
            # A positive exponent favours length: the bound is at the greatest; else at the next one.
            length = self.rules.max_length if self.length_penalty > 0 else produced + 1
            settled = best / length**self.length_penalty <= finished.scores[:, self.count - 1]
        else:
            settled = best / produced**self.length_penalty <= finished.scores[:, -1]
        return settled


def _none_yet(prompts: int, beams: int, rules: Rules, like: Tensor) -> _Texts:
    shape = (prompts, beams, rules.max_length)
    tokens = torch.full(shape, rules.end_id, device=like.device)
    return _Texts(tokens, like.new_zeros(shape), like.new_full(shape[:2], -math.inf))


def _results(prompts: Tensor, finished: _Texts, rules: Rules, count: int) -> dict[int, list[Generated]]:
    keys = finished.scores[:, :count]
    texts = cut(
        finished.tokens[:, :count].flatten(0, 1),
        finished.logprobs[:, :count].flatten(0, 1),
        rules.end_id,
        keys.flatten().tolist(),
    )
    found: dict[int, list[Generated]] = {prompt: [] for prompt in prompts.tolist()}
    for prompt, text in zip(prompts.repeat_interleave(keys.shape[1]).tolist(), texts, strict=True):
        if text.key != -math.inf:
            found[prompt].append(text)
    return found
