"""What the .pth files of ALBEF's and BLIP's authors (Li et al. 2021 and 2022) have in common: the names in them, and sizes read off their tensors.

Both hold an image encoder under timm's names, BERTs under those of transformers, projections and a matching head; beside these, momentum copies of
the encoders and projections (`_m`) and queues of features. `Kind` says which parts a file of its kind has. Numbers are never changed, only names.

Letters: E width of the embeddings, K slots of the queue.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlm.config import Head, ImageConfig, ModelConfig, TextConfig
from vlm.errors import CheckpointError
from vlm.model.convert.bert import EMBEDDINGS, HEAD, HEAD_BIAS, cross_attention_layers
from vlm.model.convert.blip import (
    LEFT_OUT,
    RETRIEVAL,
    VISION_LAYER,
    VITS,
    named_modules,
    renamed,
    text_entries,
    untie,
    vit_shape,
)

VISION_PARAMETERS = ("cls_token", "pos_embed")
VISION = ("patch_embed.proj", "norm")
VISION_BLOCK = tuple(VISION_LAYER.values())  # timm's names, which are ours
MOMENTUM = re.compile(r"(visual_encoder|vision_proj|text_encoder|text_proj|text_decoder)_m\.")
IMAGE_QUEUE, TEXT_QUEUE = "image_queue", "text_queue"
POINTERS = ("queue_ptr", "ptr_queue")
QUEUE = (IMAGE_QUEUE, TEXT_QUEUE, "idx_queue", *POINTERS)
HEAD_WIDTH = 64
"""Of an attention head, in every BERT and ViT of these authors; tensors do not say it."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    name: in words. task: what its model is for. heads: those that it has. stacks: prefix of a text stack there -> our stack and the projection of
    its memory. vocabulary: prefix of a vocabulary head there -> here. tied: prefix of a decoder that has nothing but its self-attention for itself.
    """

    name: str
    task: Literal["pretraining", "captioning", "vqa"]
    heads: tuple[Head, ...]
    stacks: dict[str, tuple[str, str]]
    vocabulary: dict[str, str]
    tied: str = ""

    @property
    def encoder(self) -> str:
        """Prefix of the stack that becomes ours called `text`."""
        return next(prefix for prefix, (stack, _) in self.stacks.items() if stack == "text.")


@dataclass(frozen=True)
class Momentum:
    """The momentum copies under our names, and the queue's features (K, E), the oldest first, if any."""

    model: dict[str, Tensor]
    image_queue: Tensor | None = None
    text_queue: Tensor | None = None


def key_table(kind: Kind, config: ModelConfig) -> dict[str, str]:
    """Every parameter's name there -> its name here, for a model of these settings."""
    return dict(_entries(kind, config))


def _entries(kind: Kind, config: ModelConfig) -> Iterator[tuple[str, str]]:
    there, ours = "visual_encoder.", "image_encoder.backbone."
    for name in VISION_PARAMETERS:
        yield there + name, ours + name
    yield from named_modules({name: name for name in VISION}, there, ours)
    for n in range(vit_shape(config).layers):
        yield from named_modules({name: name for name in VISION_BLOCK}, f"{there}blocks.{n}.", f"{ours}blocks.{n}.")
    for prefix, (stack, memory) in kind.stacks.items():
        yield from text_entries(prefix, stack, memory, config, _embeddings(config))
    for n in range(config.text.layers if kind.tied else 0):
        yield from named_modules(causal_modules(n), kind.tied, "text.")
    for prefix, head in kind.vocabulary.items():
        yield from named_modules(HEAD, prefix, head)
        yield prefix + HEAD_BIAS, f"{head}bias"
    if "contrastive" in kind.heads:
        yield from named_modules(RETRIEVAL.modules, "", "")
        yield "temp", "temperature"


def _embeddings(config: ModelConfig) -> dict[str, str]:
    return {there: ours for there, ours in EMBEDDINGS.items() if config.text.token_types or "token_type" not in ours}


def causal_modules(layer: int) -> dict[str, str]:
    """Modules of a tied decoder's layer that are its own, there and here."""
    there, ours = f"encoder.layer.{layer}.attention.", f"layers.{layer}.causal_"
    parts = {f"{there}self.{name}": f"{ours}self_attention.{name}" for name in ("query", "key", "value")}
    norm = {f"{there}output.LayerNorm": f"{ours}self_norm"}
    return parts | {f"{there}output.dense": f"{ours}self_attention.output"} | norm


def from_state_dict(state: Mapping[str, Tensor], kind: Kind, config: ModelConfig, source: str) -> dict[str, Tensor]:
    """The authors' names to ours, without momentum copies and queues. source: what messages call the file.

    Raises CheckpointError where names are missing or left over, and where copies that should be equal are not.
    """
    own = {
        name: t for name, t in state.items() if not (MOMENTUM.match(name) or name in QUEUE or LEFT_OUT.fullmatch(name))
    }
    table = key_table(kind, config)
    return _renamed(own, table, kind, source)


def _renamed(state: dict[str, Tensor], table: Mapping[str, str], kind: Kind, source: str) -> dict[str, Tensor]:
    for prefix in kind.vocabulary:
        untie(state, prefix, source)
    if kind.tied:
        _untie_decoder(state, table, kind, source)
    return renamed(state, table, f"{source} is not {kind.name}")


def _untie_decoder(state: dict[str, Tensor], table: Mapping[str, str], kind: Kind, source: str) -> None:
    """Removes what a tied decoder shares with the encoder.

    Raises CheckpointError where the two differ.
    """
    for name in [name for name in state if name.startswith(kind.tied) and name not in table]:
        twin = kind.encoder + name.removeprefix(kind.tied)
        if twin not in state:
            continue  # it is unexpected, and will be told
        if not torch.equal(state[name], state[twin]):
            raise CheckpointError(f"{source}: {name!r} differs from {twin!r}, which it shares in {kind.name}.")
        del state[name]


def momentum_of(state: Mapping[str, Tensor], kind: Kind, config: ModelConfig, source: str) -> Momentum | None:
    """The momentum copies and the queue of a file, or None where it has no copies.

    Raises CheckpointError where the copies are not those of the encoders and projections, or the queue is damaged.
    """
    copies = {name: t for name, t in state.items() if MOMENTUM.match(name) and not LEFT_OUT.fullmatch(name)}
    if not copies:
        return None
    copies = {name.replace("_m.", ".", 1): tensor for name, tensor in copies.items()}
    parts = {name.split(".")[0] for name in copies}
    table = {there: ours for there, ours in key_table(kind, config).items() if there.split(".")[0] in parts}
    vocabulary = {prefix: head for prefix, head in kind.vocabulary.items() if prefix.rstrip(".") in parts}
    of_copies = Kind(f"{kind.name} in its momentum copies", kind.task, kind.heads, kind.stacks, vocabulary)
    model = _renamed(copies, table, of_copies, source)
    image, text = state.get(IMAGE_QUEUE), state.get(TEXT_QUEUE)
    if image is None or text is None:
        return Momentum(model)
    pointer = next((int(state[name]) for name in POINTERS if name in state and state[name].numel() == 1), 0)
    if image.shape != text.shape or image.dim() != 2 or len(image) != config.embed_dim:
        shapes = f"{tuple(image.shape)} and {tuple(text.shape)}"
        raise CheckpointError(
            f"{source}: its queues have the shapes {shapes}, expected two of ({config.embed_dim}, K)."
        )
    # The pointer stands at the oldest feature, which would have been overwritten next.
    return Momentum(model, image.T.roll(-pointer, 0).contiguous(), text.T.roll(-pointer, 0).contiguous())


def sizes(state: Mapping[str, Tensor], kind: Kind, source: str) -> tuple[ImageConfig, dict[str, Any], int]:
    """What the tensors say: the image encoder, fields of `TextConfig` without cross-attention, and E.

    A tensor that is absent counts as published (base size): that it is missing is told where names are compared.

    Raises CheckpointError for sizes that none of these models has.
    """
    image = _image(state, source)
    names = [name.removeprefix(kind.encoder) for name in state if name.startswith(kind.encoder)]
    layers = [int(match[1]) for name in names if (match := re.match(r"encoder\.layer\.(\d+)\.", name))]
    dim = _size(state, f"{kind.encoder}embeddings.word_embeddings.weight", 1, 768)
    if dim % HEAD_WIDTH:
        raise CheckpointError(f"{source}: its text states have width {dim}, expected a multiple of {HEAD_WIDTH}.")
    text = {
        "vocab_size": _size(state, f"{kind.encoder}embeddings.word_embeddings.weight", 0, 30522),
        "dim": dim,
        "heads": dim // HEAD_WIDTH,
        "layers": max(layers, default=11) + 1,
        "feed_forward_dim": _size(state, f"{kind.encoder}encoder.layer.0.intermediate.dense.weight", 0, 3072),
        "max_positions": _size(state, f"{kind.encoder}embeddings.position_embeddings.weight", 0, 512),
    }
    return image, text, _size(state, "vision_proj.weight", 0, 256)


def _image(state: Mapping[str, Tensor], source: str) -> ImageConfig:
    prefix = "visual_encoder."
    blocks = [int(match[1]) for name in state if (match := re.match(rf"{prefix}blocks\.(\d+)\.", name))]
    found = (
        _size(state, f"{prefix}pos_embed", 2, 768),
        max(blocks, default=11) + 1,
        _size(state, f"{prefix}blocks.0.mlp.fc1.weight", 0, 3072),
        _size(state, f"{prefix}patch_embed.proj.weight", 2, 16),
    )
    names = [name for name, vit in VITS.items() if (vit.dim, vit.layers, vit.feed_forward_dim, vit.patch) == found]
    if not names:
        shape = "width {}, {} layers, {} inside the feed-forward part, patches of {} px".format(*found)
        raise CheckpointError(
            f"{source}: no ViT of timm's has its image encoder's shape ({shape}); known: {', '.join(VITS)}."
        )
    patches = _size(state, f"{prefix}pos_embed", 1, 197) - 1
    side = round(max(patches, 0) ** 0.5)
    if side * side != patches or side == 0:
        raise CheckpointError(
            f"{source}: pos_embed is for {patches} patches, expected a square number and the class token."
        )
    return ImageConfig(name=names[0], image_size=side * found[3], antialias=False)


def _size(state: Mapping[str, Tensor], name: str, dimension: int, published: int) -> int:
    tensor = state.get(name)
    return published if tensor is None or tensor.dim() <= dimension else tensor.shape[dimension]


def first_cross_layer(state: Mapping[str, Tensor], kind: Kind, layers: int) -> int:
    """Index of the encoder's first layer with cross-attention; published: the middle."""
    found = cross_attention_layers(name for name in state if name.startswith(kind.encoder))
    return min(found) if found else layers // 2


def text_config(fields: dict[str, Any], **more: Any) -> TextConfig:
    """The authors' BERT: dropout as in their settings."""
    return TextConfig(**fields, dropout=0.1, attention_dropout=0.1, **more)
