"""Masked image modelling: the pixels of hidden patches, from the image alone (Xie et al. 2022, SimMIM) or with its text (Kwon et al. 2022, MaskVLM).

Letters: B images, T texts, L tokens of a text, P image tokens, K hidden patches of an image, D width of the image tokens, S side of a patch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from vlm.config import TextConfig
from vlm.data.batch import Batch
from vlm.errors import ConfigError
from vlm.model.attention import CrossMemoryProjection, initialise
from vlm.model.image_encoder import ImageEncoder
from vlm.model.patches import cut, pick
from vlm.model.text_transformer import Layer
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Features, Loss, Pass, exact


class MaskedImage(nn.Module):
    """Predicts the normalised pixels of the hidden patches, which the loader draws; the mean absolute error over pixels and channels.

    Its weights serve training alone and are no part of the model: `mask_token` (D,), which stands where patches are hidden, `head`, to the pixels of
    a patch, and `reader`, the layers that read the text, if any.
    """

    scope: Literal["pair", "micro"] = "micro"

    def __init__(self, encoder: ImageEncoder, text: TextConfig | None = None) -> None:
        """text: the model's, whose states the image is to be completed from as well.

        Raises:
            ConfigError: the encoder has no patches that could be hidden, or learns nothing.
        """
        super().__init__()
        self.patch = encoder.patch
        if encoder.frozen:
            raise ConfigError(
                "objectives.masked_image trains the image encoder, but model.image.frozen=True; set it to False, or masked_image to 0."
            )
        self.mask_token = nn.Parameter(torch.zeros(encoder.dim))
        self.head = nn.Linear(encoder.dim, 3 * self.patch**2)
        self.reader = None if text is None else TextReader(encoder, text)
        nn.init.normal_(self.mask_token, std=0.02)
        initialise(self)

    def count(self, batch: Batch) -> Tensor:
        """Hidden patches of images that take part."""
        return _counted(batch).sum() * _hidden(batch).shape[1]

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:  # noqa: ARG002
        """None: here the image asks and the text answers."""
        return ()

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:  # noqa: ARG002
        """Encodes the masked view, which nothing else reads; a batch that does not count gives a 0 that still reaches every parameter."""
        at, encoder = _hidden(batch), model.image_encoder
        pixels = encoder.normalize(batch.images)
        tokens = encoder.masked(pixels, at, self.mask_token)
        if self.reader is not None:
            tokens = self._read(tokens, features, batch)
        predicted = exact(self.head(pick(tokens[:, encoder.prefix :], at)))
        errors = (predicted - pick(cut(pixels, self.patch), at)).abs().mean(2)
        total = torch.where(_counted(batch)[:, None], errors, 0.0).sum()
        return Loss(total, self.count(batch))

    def _read(self, tokens: Tensor, features: Features, batch: Batch) -> Tensor:
        text, rows = features.texts["plain"], own_text(batch)
        if text.states is None or self.reader is None:
            raise ValueError("masked images that read their text need its states; encode the plain texts.")
        read: Tensor = self.reader(tokens, text.states.index_select(0, rows), text.mask.index_select(0, rows))
        return read


class TextReader(nn.Module):
    """Layers in which image tokens are queries and a text's states keys and values: the text Transformer's, at the width of the image tokens."""

    def __init__(self, encoder: ImageEncoder, text: TextConfig, layers: int = 2) -> None:
        super().__init__()
        dim, heads = encoder.dim, encoder.backbone.blocks[0].attn.num_heads
        config = replace(text, dim=dim, heads=heads, feed_forward_dim=4 * dim, separate_causal_attention=False)
        self.memory = CrossMemoryProjection(layers, dim, text.dim, heads)
        self.layers = nn.ModuleList(Layer(config, cross_attention=True) for _ in range(layers))

    def forward(self, tokens: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, P, D) given states (B, L, .) of one text each, whose mask is (B, L) bool: (B, P, D)."""
        memory = self.memory(states, mask)
        for slot, layer in enumerate(self.layers):
            tokens = layer(tokens, None, memory, slot, False, False, None)
        return tokens


def own_text(batch: Batch) -> Tensor:
    """(B,) the row of each image's first text that says what it shows, else of its first text."""
    texts = batch.texts
    count = len(texts.ids)
    order = torch.arange(count, device=texts.image.device) + count * (~texts.describes).long()
    first = torch.full((len(batch),), 2 * count, device=order.device).scatter_reduce(0, texts.image, order, "amin")
    return first % count


def _counted(batch: Batch) -> Tensor:
    """(B,) bool: images with a text of any weight, which those in the slots of bad samples have not."""
    texts = batch.texts
    weighted = (texts.weight > 0).long()
    return torch.zeros(len(batch), dtype=torch.long, device=weighted.device).index_add_(0, texts.image, weighted) > 0


def _hidden(batch: Batch) -> Tensor:
    if batch.hidden is None:
        raise ValueError("the batch hides no patches; the loader draws them when objectives.masked_image is above 0.")
    return batch.hidden
