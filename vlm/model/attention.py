"""Multi-head attention, of a text to itself and of a text to a memory (image tokens, or a question's states).

Letters: B rows, L queries, K keys, P tokens of the memory, D width of the states, M width of the memory, H heads, E = D / H, n queries' rows that
share one row of the memory (beams, candidates).

Masks are boolean, True = attend. The fast paths are those of `scaled_dot_product_attention`; one exception is measured and stands in
`_prefers_plain`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.model.linear import Linear


class LayerCache(Protocol):
    """Keys and values of earlier positions of one layer (see `text_cache.TextCache`)."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, H, L, E) behind what is there and returns all so far, (B, H, K, E)."""
        ...


def attention_mask(mask: Tensor | None, causal: bool, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """The mask (B or 1, 1, L or 1, K) of what each query may attend to, or None where everything is allowed.

    mask: (B, K), or (B, 1, L or 1, K), or None. causal: the queries are the last of the keys' positions and see none behind their own. A query
    that may attend to nothing (it stands at padding) gets everything instead: its state means nothing, but is finite in every kernel.
    """
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None, :]
    if causal and queries > 1:
        # Query i stands at position keys - queries + i.
        lower = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        mask = lower if mask is None else mask & lower
        mask = mask.expand(1, 1, -1, -1) if mask.dim() == 2 else mask
    if mask is not None:
        mask = mask | ~mask.any(dim=-1, keepdim=True)
    return mask


def _prefers_plain(query: Tensor) -> bool:
    """bf16 training on the CPU: there SDPA's backward takes 2 to 7 times as long as that of three plain operations (torch 2.15, measured)."""
    return (
        query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled() and query.requires_grad
    )


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """The definition, softmax in fp32 (or better): states (B, H, L, E) and weights (B, H, L, K) before dropout."""
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ value, weights


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of (B, H, L, E) queries to (B, H, K, E) keys and values: states (B, H, L, E) and, if asked for, weights (B, H, L, K).

    mask: broadcastable to (B, 1, L, K). causal: excludes a mask and needs L = K; the kernels then skip half the work.
    """
    if return_weights or _prefers_plain(query):
        if causal:
            mask = attention_mask(None, True, query.shape[2], key.shape[2], query.device)
        states, weights = _plain_attention(query, key, value, mask, dropout)
        return states, weights if return_weights else None
    if causal:  # of symbolic lengths (torch.compile) a symbol, which the function would not take
        return F.scaled_dot_product_attention(query, key, value, None, dropout, is_causal=True), None
    return F.scaled_dot_product_attention(query, key, value, mask, dropout), None


def _split(states: Tensor, heads: int) -> Tensor:
    """(B, L, D) -> (B, H, L, E)."""
    return states.view(*states.shape[:-1], heads, states.shape[-1] // heads).transpose(1, 2)


def _check_heads(dim: int, heads: int) -> None:
    if dim % heads:
        raise ConfigError(
            f"dim={dim} cannot be divided among heads={heads}; choose a multiple of {heads}, or other heads."
        )


class Attention(nn.Module):
    """Multi-head self-attention, bidirectional or causal."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        _check_heads(dim, heads)
        self.heads = heads
        self.dropout = dropout
        self.query = Linear(dim, dim)
        self.key = Linear(dim, dim)
        self.value = Linear(dim, dim)
        self.output = Linear(dim, dim)

    def forward(
        self,
        states: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: LayerCache | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """New states (B, L, D); with `return_weights` a pair with the weights (B, H, L, K).

        states: (B, L, D). mask: (B, K) keys that may be attended to, or a finished mask (B, 1, L or 1, K) from `attention_mask`, or None. causal:
        no position sees a later one. cache: the L states follow its positions (K = those and L), else K = L.
        """
        query, key, value = (_split(part(states), self.heads) for part in (self.query, self.key, self.value))
        if cache is not None:
            key, value = cache.append(key, value)
        queries, keys = query.shape[2], key.shape[2]
        kernel_causal = causal and mask is None and queries == keys
        if not kernel_causal and (causal or (mask is not None and mask.dim() == 2)):
            mask = attention_mask(mask, causal, queries, keys, query.device)
        dropout = self.dropout if self.training else 0.0
        result, weights = attend(query, key, value, mask, kernel_causal, dropout, return_weights)
        output: Tensor = self.output(result.transpose(1, 2).flatten(2))
        return output if weights is None else (output, weights)


@dataclass(frozen=True)
class CrossMemory:
    """What the cross-attention layers of one stack read: keys and values (B, H, P, E), one of each a layer, in the layers' order.

    mask: (B, P) bool, true where a token stands, or None where all do.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    mask: Tensor | None = None

    def __len__(self) -> int:
        """The number of rows B."""
        return len(self.keys[0])

    def select(self, rows: Tensor) -> "CrossMemory":
        """The memory of `rows` (R,) int64, in that order, repeats allowed: negatives, beams, candidates, without another projection."""
        return CrossMemory(
            [key.index_select(0, rows) for key in self.keys],
            [value.index_select(0, rows) for value in self.values],
            None if self.mask is None else self.mask.index_select(0, rows),
        )

    @cached_property
    def attention_mask(self) -> Tensor | None:
        """(B, 1, 1, P) or None, computed once for all layers."""
        if self.mask is None:
            return None
        return attention_mask(self.mask, False, 1, self.mask.shape[1], self.mask.device)


class CrossMemoryProjection(nn.Module):
    """Projects a memory once for all cross-attention layers of a stack: one key and one value `Linear` a layer.

    layers: number of cross-attention layers; dim: width D of the text states; memory_dim: width M of the memory.
    """

    def __init__(self, layers: int, dim: int, memory_dim: int, heads: int) -> None:
        super().__init__()
        _check_heads(dim, heads)
        self.heads = heads
        self.keys = nn.ModuleList(Linear(memory_dim, dim) for _ in range(layers))
        self.values = nn.ModuleList(Linear(memory_dim, dim) for _ in range(layers))
        initialise(self, gain=0.5)  # with 1 the image drowns the words of layers that know language already

    def forward(self, states: Tensor, mask: Tensor | None = None) -> CrossMemory:
        """states: (B, P, M). mask: (B, P) bool or None."""
        keys, values = ([_split(layer(states), self.heads) for layer in part] for part in (self.keys, self.values))
        if (
            not torch.is_grad_enabled()
        ):  # decoding reads them once a token: head by head that takes half the time on a CPU
            keys, values = ([part.contiguous() for part in parts] for parts in (keys, values))
        return CrossMemory(keys, values, mask)


class CrossAttention(nn.Module):
    """Multi-head attention to a `CrossMemory`, whose keys and values were projected elsewhere."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        _check_heads(dim, heads)
        self.heads = heads
        self.dropout = dropout
        self.query = Linear(dim, dim)
        self.output = Linear(dim, dim)

    def forward(
        self, states: Tensor, memory: CrossMemory, slot: int, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """New states (B * n, L, D); with `return_weights` a pair with the weights (B * n, H, L, P).

        states: (B * n, L, D), the n rows of one memory row beside each other: they become n * L queries to that row, so the memory is neither
        copied nor read n times. slot: which of the memory's layers.
        """
        rows, length, _ = states.shape
        count = memory.keys[slot].shape[0]  # len() would make a constant of it in an exported graph
        shared = rows // count if count else 1
        if shared * count != rows:
            raise ValueError(
                f"{rows} rows of text cannot share {count} rows of memory; give equally many for each, or memory.select(rows)."
            )
        query = _split(self.query(states).reshape(count, shared * length, states.shape[-1]), self.heads)
        dropout = self.dropout if self.training else 0.0
        key, value = memory.keys[slot], memory.values[slot]
        mask = None if memory.mask is None else memory.attention_mask  # a compiler cannot read a cached property
        result, weights = attend(query, key, value, mask, False, dropout, return_weights)
        output: Tensor = self.output(result.transpose(1, 2).reshape(states.shape))
        if weights is None:
            return output
        return output, weights.unflatten(2, (shared, length)).transpose(1, 2).flatten(0, 1)


def initialise(module: nn.Module, gain: float = 1.0) -> None:
    """The start of every `Linear`, `Embedding` and `LayerNorm` inside: linear maps normal with gain / sqrt(inputs), so that they keep the size of
    normalised states; embeddings normal with BERT's 0.02; biases 0, norms 1 and 0.

    BERT's 0.02 for linear maps too suits its width of 768. A post-norm stack of width 128 is next to the identity with it: one millionth of the
    variance of the first token is of image and text together (here one hundredth), which is all that matching has to go by; with hard negatives it
    then guesses for hundreds of steps.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=gain / math.sqrt(part.in_features))
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear | nn.LayerNorm) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()
