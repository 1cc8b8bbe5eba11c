"""Greedy and beam search in NumPy, for decoders that are no PyTorch modules; what they find equals `vlm.model.beam_search`.

Letters: B prompts, n beams, L new tokens, N tokens so far, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from vlm.model.limits import Limits

Step = Callable[[NDArray, NDArray], tuple[NDArray, NDArray]]
"""New tokens (B, n, L) and a cache (B, n, ...) to logits (B, n, V) of the token after them, and the cache with them."""


def search(
    step: Step,
    start: Sequence[int],
    cache: NDArray,
    limits: Limits,
    beams: int,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """The tokens, without the end, of the best text of each prompt. start: what all texts continue. cache: the empty one, (B, 1, ...)."""
    rows = len(cache)
    ids = np.tile(np.array(start, dtype=np.int64), (rows, 1, 1))
    logits, cache = step(ids, cache)
    history, logits, cache = (np.repeat(part, beams, axis=1) for part in (ids, logits, cache))
    state = _Search(rows, limits, beams, length_penalty)
    for produced in range(limits.max_length):
        parents, tokens = state.advance(logits, history, produced)
        if state.done.all() or produced + 1 == limits.max_length:
            break
        history = np.concatenate([np.take_along_axis(history, parents[..., None], 1), tokens[..., None]], axis=2)
        logits, cache = step(tokens[..., None], cache[np.arange(rows)[:, None], parents])
    return [texts[0][1] if texts else [] for texts in state.ended]


class _Search:
    """Of 2 n candidates the first n may finish; a prompt is done when n texts are finished and the best running one is worse. One beam is greedy
    decoding: as soon as its best candidate ends, no other can be better.

    tokens: (B, n, produced). scores: (B, n), what is compared. done: (B,) bool. ended: of each prompt the finished texts, best first, each behind
    what it is compared by.
    """

    def __init__(self, rows: int, limits: Limits, beams: int, length_penalty: float) -> None:
        self.limits, self.beams, self.length_penalty = limits, beams, length_penalty
        self.tokens = np.zeros((rows, beams, 0), dtype=np.int64)
        self.scores = np.full((rows, beams), -math.inf, dtype=np.float32)
        self.scores[:, 0] = 0.0
        self.done = np.zeros(rows, dtype=bool)
        self.ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(rows)]

    def advance(self, logits: NDArray, history: NDArray, produced: int) -> tuple[NDArray, NDArray]:
        """The beams (B, n) that live on and the token (B, n) that each goes on with. logits: (B, n, V). history: (B, n, N), prompts included."""
        rows, beams, vocabulary = logits.shape
        if beams == 1:  # the penalty acts on logits here, as in `greedy`, and what came before makes no difference
            totals = self._ruled(logits, history, produced)
        else:
            totals = self._ruled(_log_softmax(logits), history, produced) + self.scores[..., None]
        flat = totals.reshape(rows, -1)
        index = np.argsort(-flat, axis=1, kind="stable")[:, : 2 * beams]
        scores, parent, token = np.take_along_axis(flat, index, 1), index // vocabulary, index % vocabulary
        grown = np.concatenate([np.take_along_axis(self.tokens, parent[..., None], 1), token[..., None]], axis=2)
        ends = token == self.limits.end_id
        length = (produced + 1) ** self.length_penalty
        for row in np.flatnonzero(~self.done).tolist():
            self._finish(row, scores[row] / length, grown[row], ends[row])
        going = np.where(ends, -math.inf, scores)
        chosen = np.argsort(-going, axis=1, kind="stable")[:, :beams]
        self.scores, self.tokens = np.take_along_axis(going, chosen, 1), np.take_along_axis(grown, chosen[..., None], 1)
        for row in np.flatnonzero(~self.done).tolist():
            texts = self.ended[row]
            self.done[row] = len(texts) == beams and self.scores[row, 0] / length <= texts[-1][0]
        return np.take_along_axis(parent, chosen, 1), np.take_along_axis(token, chosen, 1)

    def _finish(self, row: int, scores: NDArray, grown: NDArray, ends: NDArray) -> None:
        """Adds those of the first n candidates that end here. scores: (2 n,). grown: (2 n, produced + 1)."""
        beams, produced = self.beams, grown.shape[1] - 1
        for place in range(min(beams, len(scores))):
            over = produced + 1 == self.limits.max_length
            if (ends[place] or over) and scores[place] > -math.inf:
                self.ended[row].append((float(scores[place]), grown[place, : produced + (not ends[place])].tolist()))
        self.ended[row].sort(key=lambda text: -text[0])
        del self.ended[row][beams:]

    def _ruled(self, scores: NDArray, history: NDArray, produced: int) -> NDArray:
        """Scores (B, n, V) with -inf where a token is forbidden, as `vlm.model.generation.Rules.apply`."""
        limits = self.limits
        scores, size, penalty = scores.copy(), limits.no_repeat_ngram, limits.repetition_penalty
        if penalty != 1:
            used = np.take_along_axis(scores, history, 2)
            np.put_along_axis(scores, history, np.where(used < 0, used * penalty, used / penalty), 2)
        allowed_end = scores[..., limits.end_id].copy()
        if size and history.shape[2] >= size:
            windows = np.lib.stride_tricks.sliding_window_view(history, size, axis=2)  # (B, n, N - size + 1, size)
            repeats = (windows[..., :-1] == history[:, :, None, history.shape[2] - size + 1 :]).all(-1)
            row, beam, at = repeats.nonzero()
            scores[row, beam, windows[row, beam, at, -1]] = -math.inf
        if limits.no_doubled and history.shape[2]:
            np.put_along_axis(scores, history[..., -1:], -math.inf, 2)
        for *begin, last in limits.banned:
            if history.shape[2] >= len(begin):
                met = (history[:, :, history.shape[2] - len(begin) :] == np.array(begin, dtype=np.int64)).all(-1)
                scores[..., last][met] = -math.inf
        if produced < limits.min_length:
            scores[..., limits.end_id] = -math.inf
        if size or limits.no_doubled or limits.banned:
            stuck = np.isneginf(scores).all(-1)
            scores[..., limits.end_id] = np.where(stuck, allowed_end, scores[..., limits.end_id])
        return scores


def _log_softmax(logits: NDArray) -> NDArray:
    shifted = logits - logits.max(-1, keepdims=True)
    result: NDArray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
