"""Sampled decoding: one text for each prompt, or several that are all different.

Letters: B prompts, n texts of a prompt, R rows that are decoded together, L tokens of the longest prompt, V vocabulary, M tokens produced at most.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.errors import ConfigError
from vlm.model.attention import CrossMemory
from vlm.model.generation import Decoder, Generated, Rules, aligned_history, cut, decode, next_logits, read_prompt
from vlm.model.limits import check_drawing


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is drawn from: the model's distribution after the rules, then temperature, top_k (0: all) and nucleus top_p (1: all), in transformers'
    order. top_p keeps the likeliest tokens up to and with the one that reaches this share."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_drawing(self.temperature, self.top_k, self.top_p)

    @property
    def cuts(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_k > 0 or self.top_p < 1

    def chances(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (R, V) to chances (R, V), which need not sum to 1, of the tokens (R, V), likeliest first."""
        ordered, tokens = (scores / self.temperature).sort(dim=1, descending=True)
        if self.top_k:
            ordered = ordered.masked_fill(ordered < ordered[:, min(self.top_k, ordered.shape[1]) - 1, None], -math.inf)
        chances = ordered.softmax(1)
        return chances.masked_fill(chances.cumsum(1) - chances >= self.top_p, 0.0), tokens

    def log_probabilities(self, scores: Tensor) -> Tensor:
        """Scores (R, V) to log-probabilities (R, V) in fp64, -inf for what is never drawn."""
        if not self.cuts:
            return (scores.double() / self.temperature).log_softmax(1)
        chances, tokens = self.chances(scores.double())
        logs = (chances / chances.sum(1, keepdim=True)).log()
        return torch.empty_like(logs).scatter_(1, tokens, logs)


def sample(
    model: Decoder,
    memory: CrossMemory,
    ids: Tensor,
    mask: Tensor | None,
    rules: Rules,
    policy: Policy,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> list[Generated]:
    """Draws one text for each prompt. ids, mask: prompts as `read_prompt` takes them; memory: of B rows, or of a divisor of B.

    generator: one for the batch; or one for each prompt, so that a prompt's text does not depend on the batch.
    """
    count = len(ids)

    def choose(scores: Tensor, rows: Tensor) -> Tensor:
        uniform = _uniform(count, generator).to(scores.device)[rows]
        if not policy.cuts:  # in any order: sorting would take most of the time
            return _drawn((scores / policy.temperature).softmax(1), uniform)
        chances, tokens = policy.chances(scores)
        return tokens.gather(1, _drawn(chances, uniform)[:, None]).squeeze(1)

    return decode(model, memory, ids, mask, rules, choose)


@torch.no_grad()
def distinct_samples(
    model: Decoder,
    memory: CrossMemory,
    ids: Tensor,
    mask: Tensor | None,
    rules: Rules,
    policy: Policy,
    count: int,
    generators: Sequence[torch.Generator],
) -> list[list[Generated]]:
    """`count` different texts for each prompt, drawn without replacement, in the order of the draws; fewer where there are no more.

    The first is distributed as `sample`'s, the second as `sample`'s among all others, and so on: each text has its Gumbel-perturbed
    log-probability, and the largest are found by a beam search that draws a child's given that its parent's is the largest of its children
    (stochastic beam search, Kool et al. 2019, arXiv:1903.06059). ids, mask, memory: as for `sample`. generators: one for each prompt.
    """
    if count < 1:
        raise ConfigError(f"count={count}: give at least 1.")
    if len(ids) == 0:
        return []
    prompts = len(ids)
    logits, cache = read_prompt(model, memory, ids, mask, rules.max_length)
    first = torch.arange(prompts, device=ids.device).repeat_interleave(count)
    logits, history, cache = logits[first], aligned_history(ids, mask)[first], cache.select(first)
    tokens = torch.full((prompts * count, rules.max_length), rules.end_id, device=ids.device)
    logprobs = logits.new_zeros(tokens.shape)
    # Of the texts' own distribution, and perturbed; at first there is one text, without tokens, whose perturbation changes nothing.
    total = torch.where(torch.arange(count, device=ids.device) == 0, 0.0, -math.inf).double().repeat(prompts, 1)
    key, running = total.clone(), torch.ones(prompts, count, dtype=torch.bool, device=ids.device)
    for produced in range(rules.max_length):
        own = logits.log_softmax(1)
        steps = policy.log_probabilities(rules.apply(logits, history, produced)).view(prompts, count, -1)
        steps = _stay(steps, running, rules.end_id)
        totals = total[..., None] + steps
        keys = _perturbed(totals, key, running, generators)
        key, index = keys.flatten(1).topk(count, dim=1)
        parent, token = index // steps.shape[2], index % steps.shape[2]
        total = totals.flatten(1).gather(1, index)
        rows = (parent + torch.arange(prompts, device=ids.device)[:, None] * count).flatten()
        tokens, logprobs, went_on = tokens[rows], logprobs[rows], running.flatten()[rows]
        tokens[:, produced] = token.flatten()
        logprobs[:, produced] = own[rows].gather(1, token.view(-1, 1)).squeeze(1).where(went_on, 0.0)
        running = went_on.view(prompts, count) & (token != rules.end_id) & (key > -math.inf)
        if not running.any() or produced + 1 == rules.max_length:
            break
        cache.reorder(rows)
        history = torch.cat([history[rows], token.view(-1, 1)], dim=1)
        logits = next_logits(model, memory, token.flatten(), cache)
    texts = cut(tokens, logprobs, rules.end_id, key.flatten().tolist())
    return [[text for text in texts[i * count : (i + 1) * count] if text.key > -math.inf] for i in range(prompts)]


def _stay(steps: Tensor, running: Tensor, end_id: int) -> Tensor:
    """Log-probabilities (B, n, V) in which a text that has ended has one child, itself."""
    itself = torch.full_like(steps[0, 0], -math.inf)
    itself[end_id] = 0.0
    return torch.where(running[..., None], steps, itself)


def _perturbed(totals: Tensor, key: Tensor, running: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Perturbed log-probabilities (B, n, V) of all children, whose largest is their parent's, `key` (B, n)."""
    uniform = torch.stack(
        [
            torch.rand(totals.shape[1:], generator=g, dtype=torch.float64, device=g.device).to(totals.device)
            for g in generators
        ]
    )
    free = totals - (-uniform.log()).log()
    # A Gumbel variable with its maximum shifted to `key`, in the numerically stable form of the paper's appendix B.3.
    largest = free.amax(2, keepdim=True)
    gap = key[..., None] - free + torch.log1p(-(free - largest).exp())
    bound = key[..., None] - gap.clamp(min=0) - (-gap.abs()).exp().log1p()
    bound = torch.where(free > -math.inf, bound, -math.inf)
    # What has ended keeps its own.
    return torch.where(running[..., None], bound, torch.where(totals > -math.inf, key[..., None], -math.inf))


def _drawn(chances: Tensor, uniform: Tensor) -> Tensor:
    """Columns (R,) of chances (R, V), which need not sum to 1: the inverse of the distribution function at uniform (R,), fp64."""
    reached = chances.cumsum(1, dtype=torch.float64)
    place = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)
    # Rounding may lead behind the last possible token, which is the first that reaches the sum.
    return torch.minimum(place, (reached < reached[:, -1:]).sum(1, keepdim=True)).squeeze(1)


def _uniform(count: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(
            count, generator=generator, dtype=torch.float64, device=generator.device if generator else None
        )
    return torch.cat([torch.rand(1, generator=g, dtype=torch.float64, device=g.device).cpu() for g in generator])
