"""Retrieval looked at twice: the pairs that the embeddings find most alike are scored again by cross-attention (ALBEF, section 4; BLIP).

Letters: N images, P tokens of an image, M texts, L tokens of a text, R pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm.errors import ConfigError
from vlm.model.attention import CrossMemory
from vlm.model.vision_language import TextFeatures, VisionLanguageModel
from vlm.objectives.captioning import predicted
from vlm.objectives.objective import exact

By = Literal["matching", "captioning"]
LogRatios = Callable[[VisionLanguageModel, "Texts", CrossMemory], Tensor]
_TEXTS_AT_ONCE = 256

_BELOW = 1e6  # further apart than any two scores: what was not looked at again keeps its order behind what was


@dataclass(frozen=True)
class Texts:
    """ids, mask: (M, L). prompt: (M,), leading tokens that are not predicted. states: (M, L, D), where fusion goes on from the text encoder's."""

    ids: Tensor
    mask: Tensor
    prompt: Tensor
    states: Tensor | None = None

    def select(self, rows: Tensor) -> "Texts":
        """Those of `rows` (R,), as long as the longest of them."""
        mask = self.mask[rows]
        length = int(mask.sum(1).max())
        states = None if self.states is None else self.states[rows, :length]
        return Texts(self.ids[rows, :length], mask[:, :length], self.prompt[rows], states)


@torch.no_grad()
def rerank(
    model: VisionLanguageModel,
    images: Tensor,
    texts: Texts,
    similarity: NDArray,
    k: int,
    by: By,
    pairs_at_once: int = 256,
    images_at_once: int = 16,
) -> NDArray:
    """Scores (N, M), fp64: for the k texts nearest to each image and the k images nearest to each text what the embeddings say, similarity over
    temperature, plus what cross-attention says; all other pairs come after them, in their order.

    Both summands estimate how much likelier the pair is than chance, as a log ratio, so they add up without a weight to choose. by matching: the
    matching head's log odds, which were learned against negatives drawn by the first summand, hence correct it. by captioning: the text's log
    likelihood given the image, minus that given the text's candidate images on average, which takes the text's own commonness out.

    images: (N, P, D_image) tokens, on any device, best in half precision; each is projected once for both directions, and all its pairs are scored
    before its chunk is dropped. The pairs of an image share its memory without copies of it. similarity: (N, M).

    Raises:
        ConfigError: k is below 1. CheckpointError: the model has no head for it.
    """
    if k < 1:
        raise ConfigError(f"k={k}: re-rank at least 1 candidate.")
    scores = similarity.astype(np.float64) / float(model.temperature)
    candidates = _candidates(similarity, k)
    ratios = np.full(scores.shape, np.nan)
    score, stack = _SCORES[by]
    lengths = texts.mask.sum(1).cpu().numpy()
    if by == "matching" and model.config.fusion == "late":
        texts = replace(texts, states=_text_states(model, texts))
    for first in range(0, len(images), images_at_once):
        tokens = images[first : first + images_at_once].to(model.device, model.temperature.dtype)
        memory = model.memory(tokens, None, stack)
        for row in range(len(tokens)):
            alone = memory.select(torch.tensor([row], device=model.device))
            near = np.nonzero(candidates[first + row])[0]
            near = near[np.argsort(lengths[near], kind="stable")]  # texts of one length together: little padding
            for part in np.split(near, range(pairs_at_once, len(near), pairs_at_once)):
                found = score(model, texts.select(torch.from_numpy(part).to(model.device)), alone)
                ratios[first + row, part] = found.double().cpu().numpy()
    if by == "captioning":
        ratios -= _mean_likelihood(ratios)
    return np.where(candidates, scores + ratios, scores - _BELOW)


def _text_states(model: VisionLanguageModel, texts: Texts) -> Tensor:
    """(M, L, D) of the text encoder, which each text's pairs have in common; in half precision as the images' tokens, unless the model is fp64."""
    kept = torch.float64 if model.temperature.dtype == torch.float64 else torch.float16
    result = torch.empty(*texts.ids.shape, model.config.text.dim, dtype=kept, device=model.device)
    for first in range(0, len(result), _TEXTS_AT_ONCE):
        part = slice(first, first + _TEXTS_AT_ONCE)
        states = model.encode_text(texts.ids[part], texts.mask[part]).states
        assert states is not None
        result[part] = states.to(kept)
    return result


def _candidates(similarity: NDArray, k: int) -> NDArray:
    """(N, M) bool: among the k best of its row or of its column."""
    chosen = np.zeros(similarity.shape, dtype=bool)
    for axis in (0, 1):
        best = min(k, similarity.shape[axis])
        np.put_along_axis(chosen, np.argpartition(-similarity, best - 1, axis).take(range(best), axis), True, axis)
    return chosen


def _mean_likelihood(log_likelihood: NDArray) -> NDArray:
    """(1, M): the log of the mean likelihood of each text over the images that it was scored with (the others are NaN)."""
    highest = np.nanmax(log_likelihood, axis=0, keepdims=True)
    result: NDArray = highest + np.log(np.nanmean(np.exp(log_likelihood - highest), axis=0, keepdims=True))
    return result


def _matching_odds(model: VisionLanguageModel, texts: Texts, memory: CrossMemory) -> Tensor:
    states = None if texts.states is None else texts.states.to(model.temperature.dtype)
    fused = model.fuse(TextFeatures(texts.ids, texts.mask, states), memory)
    with torch.autocast(
        fused.device.type, enabled=False
    ):  # half precision's logits are too coarse to rank by: many are equal
        logits = model.matching_logits(exact(fused)).double()
    return logits[:, 1] - logits[:, 0]


def _log_likelihood(model: VisionLanguageModel, texts: Texts, memory: CrossMemory) -> Tensor:
    states = model.decode_states(texts.ids, memory)
    wanted = predicted(texts.mask, texts.prompt)
    logits = exact(model.language_logits(states[:, :-1][wanted])).log_softmax(1)
    chosen = logits.gather(1, texts.ids[:, 1:][wanted][:, None]).squeeze(1)
    rows = wanted.nonzero()[:, 0]
    return torch.zeros(len(texts.ids), dtype=torch.float64, device=chosen.device).index_add_(0, rows, chosen.double())


_SCORES: dict[By, tuple[LogRatios, Literal["fusion", "decoder"]]] = {
    "matching": (_matching_odds, "fusion"),
    "captioning": (_log_likelihood, "decoder"),
}


def join_texts(texts: Sequence[tuple[Sequence[int], int]], pad_id: int, device: torch.device) -> Texts:
    """Token ids with the number of their leading tokens that are not predicted, M of them, to padded tensors."""
    length = max(len(ids) for ids, _ in texts)
    ids = torch.full((len(texts), length), pad_id)
    for row, (tokens, _) in enumerate(texts):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    lengths = torch.tensor([len(tokens) for tokens, _ in texts])
    mask = torch.arange(length) < lengths[:, None]
    return Texts(ids.to(device), mask.to(device), torch.tensor([prompt for _, prompt in texts], device=device))
