"""BLIP's weights under our names and back, as transformers stores them.

The tables below are the whole mapping, used in both directions; each name of a module stands for its `.weight` and `.bias`. Numbers are never
changed, only names; but BlipModel's scale of the logits is the logarithm of our temperature's inverse. A class's parts and no others exist on our
side: `Form` says which heads these are.

Letters: D width of the text states.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vlm.config import Head, ModelConfig
from vlm.errors import CheckpointError
from vlm.model.convert.bert import EMBEDDINGS, HEAD, HEAD_BIAS, HEAD_BIAS_COPY, HEAD_MATRIX, LAYER, MEMORY
from vlm.model.convert.pickled import read_pickled
from vlm.model.pretrained import INDEX, WEIGHTS, read_weights

PICKLED = "pytorch_model.bin"
# Behind "vision_model." there, behind "image_encoder.backbone." here: a ViT of timm.
VISION_PARAMETERS = {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed"}
VISION = {"embeddings.patch_embedding": "patch_embed.proj", "post_layernorm": "norm"}
# Behind "vision_model.encoder.layers.N." there, behind "image_encoder.backbone.blocks.N." here.
VISION_LAYER = {
    "layer_norm1": "norm1",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# BERT's, without token types, of which BLIP has none.
TEXT = {there: ours for there, ours in EMBEDDINGS.items() if ours != "embeddings.token_type"}
DECODER = "text_decoder."
# Buffers of position numbers in files of older versions.
SHOWN = 5
"""Names that a message shows of those that do not fit."""
LEFT_OUT = re.compile(r"(.*\.)?embeddings\.position_ids")


@dataclass(frozen=True)
class Form:
    """One of transformers' BLIP classes.

    heads: those that it has. stacks: prefix of a text stack there -> our stack and the projection of its memory. modules: heads there -> here.
    parameters: the same for single parameters.
    """

    name: str
    heads: tuple[Head, ...]
    stacks: dict[str, tuple[str, str]]
    modules: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def decodes(self) -> bool:
        """Whether it produces text."""
        return "language" in self.heads


CAPTIONING = Form("BlipForConditionalGeneration", ("language",), {"text_decoder.bert.": ("text.", "fusion_memory.")})
QUESTION_ANSWERING = Form(
    "BlipForQuestionAnswering",
    ("language",),
    {"text_encoder.": ("text.", "fusion_memory."), "text_decoder.bert.": ("decoder.", "decoder_memory.")},
)
RETRIEVAL = Form(
    "BlipForImageTextRetrieval",
    ("contrastive", "matching"),
    {"text_encoder.": ("text.", "fusion_memory.")},
    {"vision_proj": "image_projection", "text_proj": "text_projection", "itm_head": "matching_head"},
)
BLIP_MODEL = Form(
    "BlipModel",
    ("contrastive",),
    {"text_model.": ("text.", "fusion_memory.")},
    {"text_model.pooler.dense": "text_pooler"},
    {
        "visual_projection.weight": "image_projection.weight",
        "text_projection.weight": "text_projection.weight",
        "logit_scale": "temperature",
    },
)
FORMS = {form.name: form for form in (CAPTIONING, QUESTION_ANSWERING, RETRIEVAL, BLIP_MODEL)}


def key_table(form: Form, config: ModelConfig) -> dict[str, str]:
    """Every parameter's name there -> its name here, for a model of these settings."""
    return dict(_entries(form, config))


def _entries(form: Form, config: ModelConfig) -> Iterator[tuple[str, str]]:
    vision, ours = "vision_model.", "image_encoder.backbone."
    for there, here in VISION_PARAMETERS.items():
        yield vision + there, ours + here
    yield from named_modules(VISION, vision, ours)
    for n in range(vit_shape(config).layers):
        yield from named_modules(VISION_LAYER, f"{vision}encoder.layers.{n}.", f"{ours}blocks.{n}.")
    for prefix, (stack, memory) in form.stacks.items():
        yield from text_entries(prefix, stack, memory, config, TEXT)
    if form.decodes:
        yield from named_modules(HEAD, DECODER, "language_head.")
        yield DECODER + HEAD_BIAS, "language_head.bias"
    yield from named_modules(form.modules, "", "")
    yield from form.parameters.items()


def text_entries(
    prefix: str, stack: str, memory: str, config: ModelConfig, embeddings: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """The names of a text stack's parameters and of its memory's projection, there and here. embeddings: table of its embeddings' modules."""
    yield from named_modules(embeddings, prefix, stack)
    layers, cross = config.text.layers, sorted(config.text.cross_attention)
    if stack == "decoder.":
        layers, cross = config.decoder_layers, list(range(config.decoder_layers))
    for n in range(layers):
        table = {there: here for there, here in LAYER.items() if n in cross or not there.startswith("cross")}
        yield from named_modules(table, f"{prefix}encoder.layer.{n}.", f"{stack}layers.{n}.")
    for slot, n in enumerate(cross):
        for there, side in MEMORY.items():
            yield from named_modules({there: f"{side}.{slot}"}, f"{prefix}encoder.layer.{n}.", memory)


def named_modules(table: Mapping[str, str], there: str, here: str) -> Iterator[tuple[str, str]]:
    """Names of weights and biases behind the two prefixes, for a table of modules."""
    for foreign, ours in table.items():
        for kind in ("weight", "bias"):
            # Embeddings have no bias.
            if kind == "weight" or not foreign.endswith("_embeddings"):
                yield f"{there}{foreign}.{kind}", f"{here}{ours}.{kind}"


def from_blip_state_dict(
    state: Mapping[str, Tensor], form: Form, config: ModelConfig, source: str
) -> dict[str, Tensor]:
    """transformers' names to ours. source: what messages call the file.

    Raises CheckpointError where names are missing or left over, and for a vocabulary head whose matrix is not the word embedding.
    """
    state = {name: tensor for name, tensor in state.items() if not LEFT_OUT.fullmatch(name)}
    if form.decodes:
        untie(state, DECODER, source)
    table = key_table(form, config)
    result = renamed(state, table, f"{source} does not hold the {form.name} that its config.json says")
    if "logit_scale" in table:
        result["temperature"] = result["temperature"].double().neg().exp().float()
    return result


def renamed(state: Mapping[str, Tensor], table: Mapping[str, str], problem: str) -> dict[str, Tensor]:
    """The tensors under our names. table: names there -> ours.

    Raises CheckpointError, which begins with `problem`, with the first names that are missing or left over.
    """
    missing = [name for name in table if name not in state]
    unexpected = [name for name in state if name not in table]
    if missing or unexpected:
        parts = [
            f"{len(names)} names {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise CheckpointError(f"{problem}: {'; '.join(parts)}.")
    return {ours: state[there] for there, ours in table.items()}


def untie(state: dict[str, Tensor], prefix: str, source: str) -> None:
    """Removes the second copies of the word embedding and of the vocabulary head's bias; files hold one of the two, or both.

    prefix: of the BERT with a vocabulary head (`text_decoder.`). source: what messages call the file.

    Raises CheckpointError where copies differ.
    """
    tied = {
        prefix + HEAD_MATRIX: f"{prefix}bert.embeddings.word_embeddings.weight",
        prefix + HEAD_BIAS_COPY: prefix + HEAD_BIAS,
    }
    for copy, name in tied.items():
        if copy in state and not torch.equal(state[copy], state.setdefault(name, state[copy])):
            raise CheckpointError(f"{source}: {copy!r} differs from {name!r}; only tied heads can be converted.")
        state.pop(copy, None)


def to_blip_state_dict(state: Mapping[str, Tensor], form: Form, config: ModelConfig) -> dict[str, Tensor]:
    """Our names to transformers', the inverse of `from_blip_state_dict`; what the class has no place for is left out."""
    result = {there: state[ours] for there, ours in key_table(form, config).items()}
    if "logit_scale" in result:
        # Through float64 the way back is exact, for a scale of at least 1: a temperature of at most 0.37.
        result["logit_scale"] = result["logit_scale"].double().log().neg().to(state["text_projection.weight"].dtype)
    return result


@dataclass(frozen=True)
class VitShape:
    """A ViT: width, layers, heads, width inside the feed-forward part, side of a patch in pixels."""

    dim: int
    layers: int
    heads: int
    feed_forward_dim: int
    patch: int


# timm's plain ViTs (class token, biases everywhere, norm before each part and at the end), which BLIP's image encoder is one of.
VITS = {
    "vit_base_patch16_224": VitShape(768, 12, 12, 3072, 16),
    "vit_large_patch16_224": VitShape(1024, 24, 16, 4096, 16),
    "vit_small_patch16_224": VitShape(384, 12, 6, 1536, 16),
    "vit_tiny_patch16_224": VitShape(192, 12, 3, 768, 16),
    "vit_base_patch32_224": VitShape(768, 12, 12, 3072, 32),
    "vit_large_patch32_224": VitShape(1024, 24, 16, 4096, 32),
    "test_vit": VitShape(64, 6, 2, 192, 16),
}


def vit_shape(config: ModelConfig) -> VitShape:
    """The image encoder's shape.

    Raises CheckpointError where it is none of BLIP's form.
    """
    image = config.image
    name = image.name.split(".")[0]  # without timm's tag of the pretrained weights
    if name not in VITS or image.stages is not None:
        raise CheckpointError(
            f"image encoder {image.name}{'' if image.stages is None else ', cut'}: BLIP has a plain ViT ({', '.join(VITS)})."
        )
    return VITS[name]


def read_blip_weights(folder: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors of a folder, and the file's name for messages: model.safetensors or its shards, else pytorch_model.bin with weights_only.

    Raises CheckpointError.
    """
    for name in (INDEX, WEIGHTS):
        if (folder / name).exists():
            return read_weights(folder), str(folder / name)
    file = folder / PICKLED
    if not file.is_file():
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {PICKLED}; download one of them beside config.json.")
    return read_pickled(file), str(file)
