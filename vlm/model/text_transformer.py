"""The text Transformer: BERT's layers (post-norm, learned positions), bidirectional or causal, with cross-attention where asked.

Letters: T texts, L tokens of the longest, D width, V vocabulary.

One `Layer` serves every mode: without a memory it is a text encoder's, with one a fusion encoder's, with `causal` a decoder's. What a mode does not
use is skipped. Weights of bert-base, MiniLM, ALBEF and BLIP load exactly (`convert`).
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.config import TextConfig
from vlm.errors import ConfigError
from vlm.model.attention import Attention, CrossAttention, CrossMemory, LayerCache, attention_mask, initialise
from vlm.model.dropout import Dropout
from vlm.model.linear import Linear
from vlm.model.text_cache import TextCache
from vlm.model.vocabulary_head import activation_function


class Embeddings(nn.Module):
    """Words, positions and (BERT) the token type 0, summed and normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.dim, padding_idx=config.pad_id)
        self.position = nn.Embedding(config.max_positions, config.dim)
        # BERT's table has two rows; the second one is kept so that its weights go in and out unchanged.
        self.token_type = nn.Embedding(2, config.dim) if config.token_types else None
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids: Tensor, offset: int | Tensor = 0, shift: Tensor | None = None) -> Tensor:
        """(T, L) int64 -> (T, L, D). offset: position number of the first token, one for all or (T,). shift: (T, L, D), added to the words."""
        length, limit = ids.shape[1], self.position.num_embeddings
        last = length + (offset if isinstance(offset, int) else 0)
        if last > limit:
            raise ConfigError(
                f"{last} tokens do not fit max_positions={limit}; cut the text, or train with more positions."
            )
        positions = torch.arange(length, device=ids.device)
        positions = positions + (offset if isinstance(offset, int) else offset[:, None])
        states = self.word(ids) + self.position(positions)
        if shift is not None:
            states = states + shift
        if self.token_type is not None:
            states = states + self.token_type.weight[0]
        result: Tensor = self.dropout(self.norm(states))
        return result


class FeedForward(nn.Module):
    """Two linear maps with an activation between."""

    def __init__(self, dim: int, inner_dim: int, activation: str) -> None:
        super().__init__()
        self.inner = Linear(dim, inner_dim)
        self.outer = Linear(inner_dim, dim)
        self.activation = activation_function(activation)

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        result: Tensor = self.outer(self.activation(self.inner(states)))
        return result


class Layer(nn.Module):
    """Self-attention, cross-attention where asked, feed-forward; each added to its input and normalised after (post-norm)."""

    def __init__(self, config: TextConfig, cross_attention: bool) -> None:
        super().__init__()
        dim, heads, dropout, eps = config.dim, config.heads, config.attention_dropout, config.norm_eps
        self.self_attention = Attention(dim, heads, dropout)
        self.self_norm = nn.LayerNorm(dim, eps=eps)
        separate = config.separate_causal_attention
        self.causal_self_attention = Attention(dim, heads, dropout) if separate else None
        self.causal_self_norm = nn.LayerNorm(dim, eps=eps) if separate else None
        self.cross_attention = CrossAttention(dim, heads, dropout) if cross_attention else None
        self.cross_norm = nn.LayerNorm(dim, eps=eps) if cross_attention else None
        self.feed_forward = FeedForward(dim, config.feed_forward_dim, config.activation)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        states: Tensor,
        mask: Tensor | None,
        memory: CrossMemory | None,
        slot: int,
        causal: bool,
        own_causal: bool,
        cache: LayerCache | None,
    ) -> Tensor:
        """(T, L, D) -> (T, L, D). mask and causal as `Attention` takes them; own_causal: the decoder's self-attention, where there is one."""
        attention, norm = self.self_attention, self.self_norm
        if own_causal and self.causal_self_attention is not None and self.causal_self_norm is not None:
            attention, norm = self.causal_self_attention, self.causal_self_norm
        states = norm(states + self.dropout(attention(states, mask, causal, cache)))
        if memory is not None and self.cross_attention is not None and self.cross_norm is not None:
            states = self.cross_norm(states + self.dropout(self.cross_attention(states, memory, slot)))
        result: Tensor = self.feed_forward_norm(states + self.dropout(self.feed_forward(states)))
        return result


class TextTransformer(nn.Module):
    """Embeddings and a stack of layers.

    checkpointing: the settings' at first; recompute each layer's activations in the backward pass, with the same dropout.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        wrong = [i for i in config.cross_attention if not 0 <= i < config.layers]
        if wrong:
            raise ConfigError(
                f"cross_attention names layers {wrong}, but there are only 0 to {config.layers - 1}; leave them out."
            )
        self.config = config
        self.checkpointing = config.checkpointing
        self.slots = {layer: slot for slot, layer in enumerate(sorted(config.cross_attention))}
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, i in self.slots) for i in range(config.layers))
        initialise(self)
        self._fixed = self._freeze()
        self.train()

    def _freeze(self) -> list[nn.Module]:
        """Stop the gradients of what the settings exclude from training: the embeddings, and layers but for their cross-attention."""
        layers, kept = len(self.layers), self.config.trainable_layers
        if kept is not None and not 0 <= kept <= layers:
            raise ConfigError(
                f"text.trainable_layers={kept}, but there are {layers} layers; use 0 to {layers}, null trains all."
            )
        if self.config.frozen:
            kept = 0
        if kept is None:
            return []
        fixed = [self.embeddings, *self.layers[: layers - kept]]
        for module in fixed:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name.startswith(("cross_attention.", "cross_norm.")))
        return fixed

    def train(self, mode: bool = True) -> Self:
        """As every module's, but what is not trained stays in evaluation mode: it drops nothing."""
        super().train(mode)
        for module in self._fixed:
            module.eval()
        return self

    @property
    def word_embedding(self) -> Tensor:
        """(V, D), which a `VocabularyHead` shares."""
        return self.embeddings.word.weight

    def embed(self, ids: Tensor, offset: int | Tensor = 0, shift: Tensor | None = None) -> Tensor:
        """(T, L) int64 -> (T, L, D). offset: position number of the first token, one for all or (T,); with a cache `cache.offset`. shift: (T, L, D),
        added to the words' embeddings.
        """
        result: Tensor = self.embeddings(ids, offset, shift)
        return result

    def new_cache(self, rows: int, max_length: int, first: int = 0, last: int | None = None) -> TextCache:
        """An empty cache for `rows` texts of up to max_length tokens, for the layers [first:last]."""
        limit = self.config.max_positions
        if max_length > limit:
            raise ConfigError(f"{max_length} tokens do not fit max_positions={limit}; ask for at most that many.")
        return TextCache(rows, max_length, (self.config.layers if last is None else last) - first, first)

    def forward(
        self,
        states: Tensor,
        mask: Tensor | None = None,
        memory: CrossMemory | None = None,
        causal: bool = False,
        cache: TextCache | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        """Runs the layers [first:last]: (T, L, D) -> (T, L, D).

        mask: (T, L) bool, true at tokens, or None; causal texts padded at their ends need none, as no token sees what follows it. memory: keys and
        values for the cross-attention layers of this stack; None skips cross-attention. One row of it may serve several texts that stand
        beside each other. cache: the states follow its positions.
        """
        length = states.shape[1]
        keys, own_causal = length, causal
        if cache is not None:
            keys += cache.length
            mask = cache.extend_mask(mask, length)
        # One mask for all layers; without padding the kernels' own causal form stays possible.
        if mask is not None or (causal and keys != length):
            mask, causal = attention_mask(mask, causal, length, keys, states.device), False
        for index in range(first, len(self.layers) if last is None else last):
            layer_cache = None if cache is None else cache.layer(index)
            arguments = (states, mask, memory, self.slots.get(index, -1), causal, own_causal, layer_cache)
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                states = checkpoint(self.layers[index], *arguments, use_reentrant=False)
            else:
                states = self.layers[index](*arguments)
        if cache is not None:
            cache.advance(length)
        return states
