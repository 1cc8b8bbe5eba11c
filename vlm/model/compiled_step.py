"""Decoding whose steps have fixed shapes, so that they can be compiled and captured in CUDA graphs: for small batches on a GPU, where launching
kernels takes longer than running them.

Letters: R rows, K positions that a cache has room for, H heads, E width of a head, D width of the states.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlm.model.attention import CrossMemory
from vlm.model.compiler import need_compiler
from vlm.model.generation import Decoder
from vlm.model.text_cache import TextCache


class CompiledDecoder:
    """A `Decoder` with the results of `model`, whose steps of one token are compiled; prompts are read as ever.

    A step sees all positions that its cache has room for, those that are still empty hidden by a mask, and changes nothing: the new keys and
    values are its results, and written behind it. So each number of rows is compiled once, at its first step, and on a GPU a captured graph may be
    replayed; beyond torch's limit of 8 shapes in a process steps run as they are. options: of `torch.compile`; by default mode="reduce-overhead" on
    a GPU, which captures.

    Raises:
        ConfigError: there is nothing to compile with.
    """

    def __init__(self, model: Decoder, device: torch.device, **options: Any) -> None:
        if not options:
            need_compiler(device)
            options = {"mode": "reduce-overhead"} if device.type == "cuda" else {}
        self.model = model
        self._step: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_step, dynamic=False, **options)

    def new_cache(self, rows: int, max_length: int) -> TextCache:
        """As the model's."""
        return self.model.new_cache(rows, max_length)

    def language_logits(self, states: Tensor) -> Tensor:
        """As the model's."""
        return self.model.language_logits(states)

    def decode_states(
        self, ids: Tensor, memory: CrossMemory, mask: Tensor | None = None, cache: TextCache | None = None
    ) -> Tensor:
        """As the model's."""
        if cache is None or cache.length == 0 or ids.shape[1] > 1 or mask is not None:
            return self.model.decode_states(ids, memory, mask, cache)
        store, seen, offset = cache.whole()
        _ = memory.attention_mask  # made here and kept, as the compiler cannot trace how
        states, new = self._step(self.model, ids, memory, store, seen, offset)
        cache.extend_mask(None, 1)
        for slot in range(cache.layers):
            cache.append(slot, new[slot, 0], new[slot, 1])
        cache.advance(1)
        return states


def _step(
    model: Decoder, ids: Tensor, memory: CrossMemory, store: Tensor, seen: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """States (R, 1, D) after one more token, and its keys and values (layers, 2, R, H, 1, E). store, seen, offset: of `TextCache.whole`."""
    cache = _Whole(store, seen, offset)
    states = model.decode_states(ids, memory, None, cache)
    return states, torch.stack([torch.stack(pair) for pair in cache.new])


class _Whole(TextCache):
    """All positions of a cache, and one more behind them that the step brings."""

    def __init__(self, store: Tensor, seen: Tensor, offset: Tensor) -> None:
        super().__init__(store.shape[2], store.shape[4] + 1, len(store))
        self.length = store.shape[4]
        self.new: list[tuple[Tensor, Tensor]] = []
        self._whole, self._seen, self._next = store, seen, offset

    @property
    def offset(self) -> Tensor:
        """(R,), given."""
        return self._next

    def extend_mask(self, mask: Tensor | None, count: int) -> Tensor:  # noqa: ARG002
        """(R, K + 1): what was seen, and the new position."""
        return torch.cat([self._seen, self._seen.new_ones(self.rows, 1)], dim=1)

    def append(self, slot: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values with the new ones, (R, H, K + 1, E), which are kept."""
        self.new.append((keys, values))
        return torch.cat([self._whole[slot, 0], keys], dim=2), torch.cat([self._whole[slot, 1], values], dim=2)
