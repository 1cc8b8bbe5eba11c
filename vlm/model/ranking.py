"""Exact ranking of a fixed list of answers: log p(answer, end | prompt), each token counted once.

Letters: B prompts, A answers, L tokens of the longest prompt or answer, N nodes of the answers' prefix tree, W nodes of a prompt read together,
V vocabulary.

A prefix's log-probability bounds that of every answer below it, as a further token can only lower it. So the search reads the most promising prefixes
first, and is finished, without having left anything to chance, when no unread prefix exceeds the k-th best answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.model.attention import CrossMemory
from vlm.model.generation import Decoder, exact_logits, kept_memory, read_prompt
from vlm.model.text_cache import TextCache


@dataclass(frozen=True)
class Ranked:
    """answer: its place in the list. score: log p(answer, end | prompt)."""

    answer: int
    score: float

    @property
    def probability(self) -> float:
        """The answer's confidence."""
        return math.exp(self.score)


def share(ranked: Sequence[Ranked]) -> float:
    """What the first of them has of the probability of all."""
    return 1.0 / sum(math.exp(other.score - ranked[0].score) for other in ranked)


class AnswerTree:
    """The prefix tree of a list of different answers, each a list of token ids without special tokens; made once, used for every batch.

    Nodes are numbered so that a node's children follow one another; node 0 is the empty prefix. Raises ValueError for an empty list or an answer
    given twice.
    """

    def __init__(self, answers: Sequence[Sequence[int]], end_id: int) -> None:
        if not answers:
            raise ValueError("the list of answers is empty; give at least one.")
        self.answers = [tuple(answer) for answer in answers]
        self.end_id = end_id
        seen: dict[tuple[int, ...], int] = {}
        for place, answer in enumerate(self.answers):
            if answer in seen:
                raise ValueError(
                    f"answers {seen[answer]} and {place} have the same tokens {list(answer)}; keep one of them."
                )
            seen[answer] = place
        prefixes = sorted({answer[:end] for answer in self.answers for end in range(len(answer) + 1)} | {()})
        prefixes.sort(key=len)  # stable: siblings stay together
        node = {prefix: i for i, prefix in enumerate(prefixes)}
        parents = [node[prefix[:-1]] for prefix in prefixes[1:]]
        self.token = torch.tensor([0, *(prefix[-1] for prefix in prefixes[1:])])  # (N,)
        self.answer = torch.tensor([seen.get(prefix, -1) for prefix in prefixes])  # (N,), -1: a prefix only
        self.depth = torch.tensor([len(prefix) for prefix in prefixes])  # (N,)
        self.children = torch.bincount(
            torch.tensor(parents, dtype=torch.long), minlength=len(prefixes)
        )  # (N,), how many
        self.first_child = 1 + self.children.cumsum(0) - self.children  # (N,)
        self.path = torch.full(
            (len(prefixes), max(1, len(prefixes[-1]))), end_id
        )  # (N, L), a node's own tokens, then padding
        for i, prefix in enumerate(prefixes):
            self.path[i, : len(prefix)] = torch.tensor(prefix, dtype=torch.long)

    def __len__(self) -> int:
        """The number of answers A."""
        return len(self.answers)

    def to(self, device: torch.device) -> "AnswerTree":
        """The tree on `device`; this one where it is there already."""
        if self.token.device == device:
            return self
        moved = object.__new__(AnswerTree)
        moved.__dict__ = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return moved


@torch.no_grad()
def rank_answers(
    model: Decoder,
    memory: CrossMemory,
    ids: Tensor,
    mask: Tensor | None,
    tree: AnswerTree,
    k: int = 1,
    width: int = 16,
) -> list[list[Ranked]]:
    """For each prompt the k best answers, best first, exactly as scoring all of them would give.

    ids, mask: prompts as `read_prompt` takes them. memory: of B rows, or of a divisor of B. width: most prefixes read together for one prompt;
    it changes the time, not the result. k: at most the number of answers are returned.
    """
    if k < 1 or width < 1:
        raise ValueError(f"{k=}, {width=}: both must be at least 1.")
    if len(ids) == 0:
        return []
    search = _Search(model, memory, ids, mask, tree.to(ids.device), min(k, len(tree)))
    while search.read(width):
        pass
    scores, places = search.complete.topk(search.k, dim=1)
    return [
        [Ranked(place, score) for place, score in zip(*pair, strict=True)]
        for pair in zip(places.tolist(), scores.tolist(), strict=True)
    ]


class _Search:
    """Best-first search over the tree for all prompts of a batch together.

    complete: (B, A) scores of the answers met, else -inf. open: (B, N) log-probabilities of the prefixes that are known but not read, else -inf.
    partial: (B, N) of all known prefixes. prompts: those still in the cache and the memory, which finished ones leave when half of them have.
    """

    def __init__(
        self, model: Decoder, memory: CrossMemory, ids: Tensor, mask: Tensor | None, tree: AnswerTree, k: int
    ) -> None:
        self.model, self.memory, self.tree, self.k = model, memory, tree, k
        logits, self.cache = read_prompt(model, memory, ids, mask, tree.path.shape[1])
        self.prompts = torch.arange(len(ids), device=ids.device)
        self.complete = logits.new_full((len(ids), len(tree)), -math.inf)
        self.partial = logits.new_full((len(ids), len(tree.token)), -math.inf)
        self.open = self.partial.clone()
        self.partial[:, 0] = 0.0
        self._learn(self.prompts, torch.zeros_like(self.prompts), logits)

    def read(self, width: int) -> bool:
        """Reads up to `width` prefixes of each prompt that may lead to one of its k best answers; False: there are none left."""
        worst = self.complete.topk(self.k, dim=1).values[:, -1:]
        hopeful = self.open.masked_fill(self.open <= worst, -math.inf)[self.prompts]
        values, nodes = hopeful.topk(min(width, hopeful.shape[1]), dim=1)
        wanted = values > -math.inf
        counts = wanted.sum(1)
        most = int(counts.max())
        if most == 0:
            return False
        active = (counts > 0).nonzero().squeeze(1)
        if len(active) * 2 <= len(self.prompts):
            self.memory = kept_memory(self.memory, active, len(self.prompts))
            self.cache, self.prompts = self.cache.select(active), self.prompts[active]
            nodes, wanted = nodes[active], wanted[active]
        # Every prompt gets equally many rows, so that they share its memory; rows without a wish read node 1 and are not looked at.
        wanted = wanted[:, :most]
        nodes = nodes[:, :most].where(wanted, 1)
        logits = self._logits(nodes)[wanted]
        prompts = self.prompts[:, None].expand_as(nodes)[wanted]
        self.open[prompts, nodes[wanted]] = -math.inf
        self._learn(prompts, nodes[wanted], logits)
        return True

    def _logits(self, nodes: Tensor) -> Tensor:
        """Logits (B, W, V) after the prefixes `nodes` (B, W). Answers are short: reading them anew costs less than keeping caches."""
        depth = self.tree.depth[nodes.flatten()]
        length = int(depth.max())
        rows = torch.arange(len(nodes), device=nodes.device).repeat_interleave(nodes.shape[1])
        ids = self.tree.path[nodes.flatten(), :length]
        states = _read(self.model, self.memory, ids, depth, self.cache.select(rows))
        last = states[torch.arange(len(rows), device=rows.device), depth - 1]
        return exact_logits(self.model, last).view(*nodes.shape, -1)

    def _learn(self, prompts: Tensor, nodes: Tensor, logits: Tensor) -> None:
        """Enters what the logits (R, V) after the prefixes `nodes` (R,) of `prompts` (R,) say about their ends and their children."""
        tree, total = self.tree, logits.logsumexp(1)
        here = self.partial[prompts, nodes]
        answers = tree.answer[nodes]
        ended = answers >= 0
        self.complete[prompts[ended], answers[ended]] = (here + logits[:, tree.end_id] - total)[ended]
        counts = tree.children[nodes]
        row = torch.arange(len(nodes), device=nodes.device).repeat_interleave(counts)
        place = torch.arange(len(row), device=nodes.device) - (counts.cumsum(0) - counts)[row]
        child = tree.first_child[nodes][row] + place
        values = here[row] + logits[row, tree.token[child]] - total[row]
        self.partial[prompts[row], child] = values
        self.open[prompts[row], child] = values


def _read(model: Decoder, memory: CrossMemory, ids: Tensor, lengths: Tensor, cache: TextCache) -> Tensor:
    """States (R, L, D) of `ids` (R, L), of which the first `lengths` (R,) of each row count."""
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    states: Tensor = model.decode_states(ids, memory, None if bool(mask.all()) else mask, cache)
    return states


@torch.no_grad()
def score_answers(
    model: Decoder, memory: CrossMemory, ids: Tensor, mask: Tensor | None, tree: AnswerTree, rows: int = 512
) -> Tensor:
    """Scores (B, A) of all answers, each read in full: what `rank_answers` must agree with. rows: most rows decoded together."""
    tree = tree.to(ids.device)
    length = tree.path.shape[1]
    logits, cache = read_prompt(model, memory, ids, mask, length)
    order = torch.zeros(len(tree), dtype=torch.long, device=ids.device)
    nodes = (tree.answer >= 0).nonzero().squeeze(1)
    order[tree.answer[nodes]] = nodes
    first = logits.log_softmax(1)
    chunk, parts = max(1, rows // max(1, len(ids))), []
    for chosen in order.split(chunk):
        path, depth = tree.path[chosen], tree.depth[chosen]
        prompts = torch.arange(len(ids), device=ids.device).repeat_interleave(len(chosen))
        states = _read(model, memory, path.repeat(len(ids), 1), depth.repeat(len(ids)), cache.select(prompts))
        after = exact_logits(model, states).log_softmax(-1)
        # What follows each position: the next token, and behind the last one the end, with which the path is padded.
        distributions = torch.cat([first[prompts][:, None], after], dim=1)
        targets = torch.cat([path, path.new_full((len(path), 1), tree.end_id)], dim=1).repeat(len(ids), 1)
        values = distributions.gather(2, targets[..., None]).squeeze(2)
        counted = torch.arange(length + 1, device=ids.device) <= depth.repeat(len(ids))[:, None]
        parts.append(values.masked_fill(~counted, 0.0).sum(1).view(len(ids), -1))
    return torch.cat(parts, dim=1)
