"""Keys and values of the tokens already read, so that each further token costs one position.

Letters: R rows, L new positions, K positions so far and L, H heads, E width of a head.
"""

import torch
from torch import Tensor


class TextCache:
    """Self-attention keys and values for R rows and some layers, preallocated.

    rows: R. max_length: positions that fit. layers: number of layers, the first of which has the index `first` in its transformer.

    Texts of several lengths are padded at their ends and come with a mask: the padding stays in the cache as holes which are never attended to and
    take up no position number, so a row's results do not depend on the others'.
    """

    def __init__(self, rows: int, max_length: int, layers: int, first: int = 0) -> None:
        self.rows = rows
        self.max_length = max_length
        self.layers = layers
        self.first = first
        self.length = 0
        self._mask: Tensor | None = None  # (R, K), while there are holes
        self._store: Tensor | None = None  # (layers, 2, R, H, max_length, E); the first keys tell its type and place

    @property
    def offset(self) -> int | Tensor:
        """The position number of the next token: an int, or (R,) where there are holes."""
        return self.length if self._mask is None or self.length == 0 else self._mask[:, : self.length].sum(1)

    def layer(self, index: int) -> "LayerView":
        """The cache of the layer with this index in its transformer."""
        return LayerView(self, index - self.first)

    def append(self, slot: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (R, H, L, E) behind `length` and returns all up to there; `advance` makes it count, after the last layer."""
        end = self.length + keys.shape[2]
        if len(keys) != self.rows or end > self.max_length:
            raise ValueError(
                f"{len(keys)} rows of {end} positions do not fit a cache of {self.rows} rows and {self.max_length} positions; "
                "make it with more, or select its rows."
            )
        if self._store is None:
            # Zeros, as a step of fixed shapes reads what was not written too, and must not find NaN.
            self._store = keys.new_zeros(self.layers, 2, self.rows, keys.shape[1], self.max_length, keys.shape[3])
        self._store[slot, 0, :, :, self.length : end] = keys
        self._store[slot, 1, :, :, self.length : end] = values
        return self._store[slot, 0, :, :, :end], self._store[slot, 1, :, :, :end]

    def extend_mask(self, mask: Tensor | None, count: int) -> Tensor | None:
        """The mask (R, K) of all positions with `count` new ones, whose own mask is (R, count) bool or None for no padding."""
        if mask is None and self._mask is None:
            return None
        known = mask if mask is not None else self._mask
        assert known is not None
        past = self._mask if self._mask is not None else known.new_ones(self.rows, self.length)
        new = mask if mask is not None else known.new_ones(self.rows, count)
        self._mask = torch.cat([past[:, : self.length], new], dim=1)
        return self._mask

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """For a step of fixed shapes, of a cache that is not empty: the keys and values (layers, 2, R, H, max_length, E), which of their positions
        may be attended to (R, max_length), and the position number of the next token (R,)."""
        assert self._store is not None
        seen = torch.zeros(self.rows, self.max_length, dtype=torch.bool, device=self._store.device)
        seen[:, : self.length] = True if self._mask is None else self._mask[:, : self.length]
        return self._store, seen, seen.sum(1)

    def advance(self, count: int) -> None:
        """Counts the positions that every layer has just appended."""
        self.length += count

    def select(self, rows: Tensor) -> "TextCache":
        """A cache of `rows` ((N,) int64, any number, repeats allowed) which shares nothing with this one."""
        chosen = TextCache(len(rows), self.max_length, self.layers, self.first)
        chosen.length = self.length
        chosen._mask = None if self._mask is None else self._mask.index_select(0, rows)
        if self._store is not None:
            shape = list(self._store.shape)
            shape[2] = len(rows)
            chosen._store = self._store.new_zeros(shape)
            chosen._store[..., : self.length, :] = self._store[..., : self.length, :].index_select(2, rows)
        return chosen

    def reorder(self, rows: Tensor) -> None:
        """Replaces each row by the one named in `rows` (R,), in place: the beams that live on."""
        if self._mask is not None:
            self._mask = self._mask.index_select(0, rows)
        if self._store is not None:
            self._store[..., : self.length, :] = self._store[..., : self.length, :].index_select(2, rows)


class LayerView:
    """One layer of a `TextCache`: the `LayerCache` that `Attention` takes."""

    def __init__(self, cache: TextCache, slot: int) -> None:
        self._cache = cache
        self._slot = slot

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `TextCache.append`."""
        return self._cache.append(self._slot, keys, values)
