"""A tiny random decoder for the tests of decoding and ranking."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel

from vlm.config import TextConfig
from vlm.model.attention import CrossMemory, CrossMemoryProjection
from vlm.model.convert.bert import from_bert_state_dict
from vlm.model.text_cache import TextCache
from vlm.model.text_transformer import TextTransformer
from vlm.model.vocabulary_head import VocabularyHead

END, P, D = 3, 5, 24


@dataclass
class TinyDecoder:
    """A tiny random decoder with cross-attention, fp64, and transformers' model with the same weights."""

    reference: Any
    transformer: TextTransformer
    projection: CrossMemoryProjection
    head: VocabularyHead

    def new_cache(self, rows: int, max_length: int) -> TextCache:
        return self.transformer.new_cache(rows, max_length)

    def decode_states(
        self, ids: Tensor, memory: CrossMemory, mask: Tensor | None = None, cache: TextCache | None = None
    ) -> Tensor:
        states = self.transformer.embed(ids, 0 if cache is None else cache.offset)
        result: Tensor = self.transformer(states, mask, memory, causal=True, cache=cache)
        return result

    def language_logits(self, states: Tensor) -> Tensor:
        result: Tensor = self.head(states, self.transformer.word_embedding)
        return result

    def images(self, rows: int = 4) -> tuple[Tensor, Tensor]:
        """Image tokens (rows, P, D) and their mask."""
        g = torch.Generator().manual_seed(7)
        mask = torch.arange(P) < torch.tensor([5, 3, 4, 5])[:rows, None]
        return torch.randn(rows, P, D, dtype=torch.float64, generator=g), mask

    def memory(self, rows: int = 4) -> CrossMemory:
        """Of those images."""
        result: CrossMemory = self.projection(*self.images(rows))
        return result

    def logprobs(self, ids: Tensor, memory: CrossMemory) -> Tensor:
        """Without a cache: (R, L, V)."""
        return self.language_logits(self.decode_states(ids, memory)).log_softmax(-1)


def _decoder(seed: int = 0, vocab: int = 30) -> TinyDecoder:
    torch.manual_seed(seed)
    shape = {"vocab_size": vocab, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 3}
    more = {"intermediate_size": 32, "max_position_embeddings": 40, "initializer_range": 0.25}
    config = BertConfig(**shape, **more, is_decoder=True, add_cross_attention=True)
    reference = BertLMHeadModel(config).double().eval()
    with torch.no_grad():  # texts should end, some early
        reference.cls.predictions.bias[END] += 2.0
    weights = from_bert_state_dict(reference.state_dict())
    ours = TextConfig(
        vocab_size=vocab, dim=D, heads=3, layers=2, feed_forward_dim=32, max_positions=40, cross_attention=(0, 1)
    )
    parts = TextTransformer(ours), CrossMemoryProjection(2, D, D, 3), VocabularyHead(ours)
    for part, state in zip(parts, (weights.transformer, weights.memory, weights.head), strict=True):
        part.double().eval().requires_grad_(False).load_state_dict(state)
    return TinyDecoder(reference, *parts)


@pytest.fixture
def tiny_decoder() -> Callable[..., TinyDecoder]:
    """Makes a decoder: (seed=0, vocab=30)."""
    torch.set_num_threads(1)  # faster for shapes as small as these
    return _decoder
