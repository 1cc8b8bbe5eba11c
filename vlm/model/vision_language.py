"""The vision-language model: its parts, their heads, and the way between them.

Letters: B images, T texts, L tokens of a text, P image tokens, D width of the text states, E width of the embeddings, V vocabulary, R rows.

The family's members are settings of one structure. ALBEF (Li et al. 2021): `fusion: late`, cross-attention in the last layers, a separate decoder
that reads the question. BLIP (Li et al. 2022): `fusion: full`, cross-attention everywhere, a shared decoder with causal self-attention of its own.
`heads` names the heads that there are: a converted captioner has the language head only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.config import ModelConfig, TextConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.model.answer_head import AnswerHead
from vlm.model.attention import CrossMemory, CrossMemoryProjection, initialise
from vlm.model.image_encoder import ImageEncoder
from vlm.model.lengths import by_length
from vlm.model.text_cache import TextCache
from vlm.model.text_transformer import TextTransformer
from vlm.model.vocabulary_head import VocabularyHead

Mode = Literal["text", "fused", "decoder"]
Part = TypeVar("Part", Tensor, nn.Module)


@dataclass(frozen=True)
class ImageFeatures:
    """tokens: (B, P, D_image). projected: (B, E), unit length, fp32; absent without a contrastive head."""

    tokens: Tensor
    projected: Tensor | None = None

    @property
    def embedding(self) -> Tensor:
        """(B, E), unit length, fp32.

        Raises:
            CheckpointError: the model has no contrastive head.
        """
        return _present(self.projected, "contrastive")


@dataclass(frozen=True)
class TextFeatures:
    """A view of the texts. ids, mask: (T, L). states: (T, L, D), absent where fusion starts from the ids. embedding: (T, E), unit length, fp32."""

    ids: Tensor
    mask: Tensor
    states: Tensor | None = None
    embedding: Tensor | None = None

    def select(self, rows: Tensor, length: int | None = None) -> "TextFeatures":
        """Rows (R,) in that order, repeats allowed, cut to `length` tokens; the embedding is left behind."""
        states = None if self.states is None else self.states[:, :length].index_select(0, rows)
        return TextFeatures(
            self.ids[:, :length].index_select(0, rows), self.mask[:, :length].index_select(0, rows), states
        )

    @staticmethod
    def join(parts: Sequence["TextFeatures"]) -> "TextFeatures":
        """Several views below each other; all must be of one length and all with states, or none."""
        states = [p.states for p in parts if p.states is not None]
        return TextFeatures(
            torch.cat([p.ids for p in parts]),
            torch.cat([p.mask for p in parts]),
            torch.cat(states) if states else None,
        )


class VisionLanguageModel(nn.Module):
    """Image encoder, text Transformer, their fusion and a decoder, with every head that training or inference needs.

    Absent heads (`config.heads`) are None and have no weights; what needs one raises CheckpointError. The temperature is always there: it is a
    setting that is learned.
    """

    def __init__(self, config: ModelConfig, load: bool = True) -> None:
        """load=False leaves out the image encoder's pretrained weights, because a checkpoint follows."""
        super().__init__()
        self.config = config
        text = config.text
        if config.fusion == "late" and not text.cross_attention:
            raise ConfigError("model.text.cross_attention is empty; late fusion needs the layers that read the image.")
        self.image_encoder = ImageEncoder(config.image, load)
        self.text = TextTransformer(text)
        self.fusion_memory = CrossMemoryProjection(
            len(text.cross_attention), text.dim, self.image_encoder.dim, text.heads
        )
        self._add_heads(config)
        self.decoder: TextTransformer | None = None
        self.decoder_memory: CrossMemoryProjection | None = None
        if config.decoder == "separate":
            stack = decoder_config(config)
            memory_dim = self.image_encoder.dim if config.decoder_reads == "image" else text.dim
            self.decoder = TextTransformer(stack)
            self.decoder_memory = CrossMemoryProjection(stack.layers, text.dim, memory_dim, text.heads)

    def _add_heads(self, config: ModelConfig) -> None:
        text, heads, bias = config.text, config.heads, config.projection_bias
        contrastive, pooler = "contrastive" in heads, config.text_pool == "pooler"
        self.image_projection = nn.Linear(self.image_encoder.dim, config.embed_dim, bias) if contrastive else None
        self.text_pooler = nn.Linear(text.dim, text.dim) if contrastive and pooler else None
        self.text_projection = nn.Linear(text.dim, config.embed_dim, bias) if contrastive else None
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.matching_head = nn.Linear(text.dim, 2) if "matching" in heads else None
        self.masked_language_head = VocabularyHead(text) if "masked_language" in heads else None
        self.language_head = VocabularyHead(text) if "language" in heads else None
        self.answer_head = AnswerHead(text.dim, config.answers, text.norm_eps) if "classifier" in heads else None
        for module in (self.image_projection, self.text_pooler, self.text_projection, self.matching_head):
            if module is not None:
                initialise(module)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.temperature.device

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """images: (B, 3, H, W), uint8 or already normalised float."""
        tokens = self.image_encoder(images)
        if self.image_projection is None:
            return ImageFeatures(tokens)
        pooled = self.image_encoder.pool(tokens)
        if self.config.image_pool_norm:
            pooled = self.image_encoder.backbone.norm(pooled)
        return ImageFeatures(tokens, _unit(self.image_projection(pooled)))

    def encode_text(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """ids: (T, L) int64. mask: (T, L) bool."""
        ids = self.with_first_token(ids, "text")

        def run(rows: Tensor, length: int) -> Tensor:
            shorter = ids[rows, :length], mask[rows, :length]
            states: Tensor = self.text(self.text.embed(shorter[0]), shorter[1], last=self._text_layers)
            return states

        states = by_length(mask, run)
        if self.text_projection is None:
            return TextFeatures(ids, mask, states)
        if self.config.text_pool == "mean":
            weight = mask[..., None].to(states.dtype)
            pooled = (states * weight).sum(1) / weight.sum(1)
        else:
            pooled = states[:, 0] if self.text_pooler is None else self.text_pooler(states[:, 0]).tanh()
        return TextFeatures(ids, mask, states, _unit(self.text_projection(pooled)))

    def text_view(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """What `fuse` needs of another view of the texts (with hidden tokens), and no more: full fusion starts from the ids."""
        if self.config.fusion == "full":
            return TextFeatures(ids, mask)
        return replace(self.encode_text(ids, mask), embedding=None)

    def fusion_view(self, text: TextFeatures) -> TextFeatures:
        """`text` without what `fuse` does not read."""
        return TextFeatures(text.ids, text.mask, None if self.config.fusion == "full" else text.states)

    def memory(self, states: Tensor, mask: Tensor | None, stack: Literal["fusion", "decoder"]) -> CrossMemory:
        """Keys and values of `states` (B, P, D_memory) for every cross-attention layer of a stack, projected once."""
        projection = (
            self.decoder_memory if stack == "decoder" and self.decoder_memory is not None else self.fusion_memory
        )
        result: CrossMemory = projection(states, mask)
        return result

    def fuse(self, text: TextFeatures, memory: CrossMemory) -> Tensor:
        """States (T, L, D) of the texts given the images, bidirectional. memory: of T rows, or of a divisor of T."""
        if self.config.fusion == "late":
            if text.states is None:
                raise ValueError("late fusion continues from the text's states; use encode_text or text_view.")
            states: Tensor = self.text(text.states, text.mask, memory, first=self._text_layers)
        else:
            states = self.text(self.text.embed(self.with_first_token(text.ids, "fused")), text.mask, memory)
        return states

    def decode_states(
        self,
        ids: Tensor,
        memory: CrossMemory,
        mask: Tensor | None = None,
        cache: TextCache | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Causal states (R, L, D) of the decoder's last layer; the language head makes logits of those that are wanted.

        shift: (R, L, D), added to the words' embeddings.
        """
        stack = self.text if self.decoder is None else self.decoder
        if cache is None or cache.length == 0:
            ids = self.with_first_token(ids, "decoder")
        # Rows with prompts of different lengths count their own positions.
        offset = 0 if cache is None else cache.offset
        states: Tensor = stack(stack.embed(ids, offset, shift), mask, memory, causal=True, cache=cache)
        return states

    def decode(
        self, ids: Tensor, memory: CrossMemory, cache: TextCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits (R, L, V) of the token after each of `ids` (R, L). memory: of R rows, or of a divisor of R (beams share a row)."""
        return self.language_logits(self.decode_states(ids, memory, mask, cache))

    def language_logits(self, states: Tensor) -> Tensor:
        """(..., D) states of the decoder to (..., V) logits of the next token."""
        stack = self.text if self.decoder is None else self.decoder
        logits: Tensor = _present(self.language_head, "language")(states, stack.word_embedding)
        return logits

    def masked_language_logits(self, states: Tensor) -> Tensor:
        """(..., D) fused states at hidden tokens to (..., V) logits of the tokens hidden."""
        logits: Tensor = _present(self.masked_language_head, "masked_language")(states, self.text.word_embedding)
        return logits

    def matching_logits(self, states: Tensor) -> Tensor:
        """(T, L, D) fused states to (T, 2) logits; class 1: image and text belong together."""
        logits: Tensor = _present(self.matching_head, "matching")(states[:, 0])
        return logits

    def answer_logits(self, states: Tensor) -> Tensor:
        """(T, L, D) fused states of questions to (T, A) logits, one for each answer of the list."""
        logits: Tensor = _present(self.answer_head, "classifier")(states[:, 0])
        return logits

    def new_cache(self, rows: int, max_length: int) -> TextCache:
        """An empty cache of the decoder for `rows` texts of at most `max_length` tokens."""
        stack = self.text if self.decoder is None else self.decoder
        return stack.new_cache(rows, max_length)

    def clamp_temperature(self) -> None:
        """ALBEF's bounds of the temperature; called after each optimizer step."""
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)

    @property
    def _text_layers(self) -> int | None:
        """How many layers run without the image: all in full fusion, those below the first cross-attention in late fusion."""
        return None if self.config.fusion == "full" else min(self.config.text.cross_attention)

    def with_first_token(self, ids: Tensor, mode: Mode) -> Tensor:
        """ids (T, L) as that mode reads them: with the first token that `config.first_token` names for it, if any."""
        token = self.config.first_token.get(mode)
        if token is None:
            return ids
        return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)


def decoder_config(config: ModelConfig) -> TextConfig:
    """The text settings of a separate decoder: fewer layers, all with cross-attention."""
    return replace(
        config.text,
        layers=config.decoder_layers,
        cross_attention=tuple(range(config.decoder_layers)),
        separate_causal_attention=False,
        frozen=False,
        trainable_layers=None,
    )


def _present(part: Part | None, head: str) -> Part:
    """Raises CheckpointError where a head is absent."""
    if part is None:
        raise CheckpointError(f"this model has no {head} head; give a checkpoint whose model.heads name it.")
    return part


def _unit(projected: Tensor) -> Tensor:
    return F.normalize(projected.float() if projected.dtype != torch.float64 else projected, dim=-1)
