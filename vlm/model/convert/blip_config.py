"""BLIP's config.json as our model settings and back."""

from collections.abc import Mapping
from typing import Any

from vlm.config import ImageConfig, ModelConfig, TextConfig
from vlm.errors import CheckpointError
from vlm.model.convert.bert import ACTIVATIONS
from vlm.model.convert.blip import BLIP_MODEL, FORMS, QUESTION_ANSWERING, VITS, Form, VitShape, vit_shape

TIMM_EPS = 1e-6
# TextConfig's fields by their names there, with transformers' defaults for entries that are absent.
TEXT_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 30524),
    "dim": ("hidden_size", 768),
    "heads": ("num_attention_heads", 8),
    "layers": ("num_hidden_layers", 12),
    "feed_forward_dim": ("intermediate_size", 3072),
    "max_positions": ("max_position_embeddings", 512),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "dropout": ("hidden_dropout_prob", 0.0),
    "attention_dropout": ("attention_probs_dropout_prob", 0.0),
    "pad_id": ("pad_token_id", 0),
}
VISION_FIELDS: dict[str, tuple[str, Any]] = {
    "dim": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "feed_forward_dim": ("intermediate_size", 3072),
    "patch": ("patch_size", 16),
}


def form_of(foreign: Mapping[str, Any], source: str) -> Form:
    """Which of transformers' classes a config.json is of. source: what messages call it.

    Raises CheckpointError for another model.
    """
    if foreign.get("model_type") != "blip":
        raise CheckpointError(f"{source}: model_type is {foreign.get('model_type')!r}, expected 'blip'.")
    names = foreign.get("architectures") or []
    for name in names:
        if name in FORMS:
            return FORMS[name]
    raise CheckpointError(f"{source}: architectures is {names}, expected one of {', '.join(FORMS)}.")


def from_blip_config(foreign: Mapping[str, Any], source: str) -> ModelConfig:
    """Our settings of the model that a config.json describes. What is absent there has transformers' default.

    transformers reads questions and texts behind [CLS], where the authors' code puts [ENC]; so do converted models, which is what
    `first_token` says: the decoder's first token is [DEC], the others stay.

    Raises CheckpointError for what cannot be expressed.
    """
    form = form_of(foreign, source)
    text, vision = foreign.get("text_config") or {}, foreign.get("vision_config") or {}
    activation, vision_activation = text.get("hidden_act", "gelu"), vision.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS or vision_activation != "gelu":
        raise CheckpointError(f"{source}: hidden_act is {activation!r} and {vision_activation!r}, expected 'gelu'.")
    fields = {ours: text.get(there, default) for ours, (there, default) in TEXT_FIELDS.items()}
    layers = tuple(range(fields["layers"])) if text.get("is_decoder", True) else ()
    shape = VitShape(**{ours: vision.get(there, default) for ours, (there, default) in VISION_FIELDS.items()})
    names = [name for name, known in VITS.items() if known == shape]
    if not names:
        raise CheckpointError(
            f"{source}: no ViT of timm's has vision_config's shape ({shape}); known: {', '.join(VITS)}."
        )
    size = vision.get("image_size", 384)
    if not isinstance(size, int):
        raise CheckpointError(
            f"{source}: vision_config.image_size is {size}, expected one number: the side of a square."
        )
    reads_question, pooler = form is QUESTION_ANSWERING, form is BLIP_MODEL
    if reads_question and fields["dim"] != shape.dim:
        raise CheckpointError(
            f"{source}: text and vision hidden_size are {fields['dim']} and {shape.dim}; the decoder reads both, so they must be equal."
        )
    return ModelConfig(
        image=ImageConfig(name=names[0], image_size=size, norm_eps=vision.get("layer_norm_eps", 1e-5), antialias=False),
        text=TextConfig(
            **fields,
            token_types=False,
            activation=ACTIVATIONS[activation],
            cross_attention=layers,
        ),
        embed_dim=foreign.get("projection_dim", 512) if pooler else foreign.get("image_text_hidden_size", 256),
        heads=form.heads,
        text_pool="pooler" if pooler else "first",
        image_pool_norm=pooler,
        projection_bias=not pooler,
        decoder="separate" if reads_question else "shared",
        decoder_layers=fields["layers"],
        decoder_reads="question" if reads_question else "image",
        first_token={"decoder": text.get("bos_token_id", 30522)},
        label=f"BLIP ({form.name})",
    )


def to_blip_config(config: ModelConfig, form: Form, image_size: int, cls_id: int, end_id: int) -> dict[str, Any]:
    """config.json for transformers. image_size: pixels, of the positions in the weights. cls_id, end_id: the tokens that a text begins and ends with.

    Raises CheckpointError where the model has another structure than BLIP's.
    """
    shape, text = vit_shape(config), config.text
    _refuse_others(config, form)
    activation = next(there for there, ours in ACTIVATIONS.items() if ours == text.activation)
    return {
        "architectures": [form.name],
        "model_type": "blip",
        "projection_dim" if form is BLIP_MODEL else "image_text_hidden_size": config.embed_dim,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "blip_text_model",
            **{there: getattr(text, ours) for ours, (there, _) in TEXT_FIELDS.items()},
            "encoder_hidden_size": shape.dim,
            "hidden_act": activation,
            "is_decoder": bool(text.cross_attention),
            "bos_token_id": config.first_token.get("decoder", cls_id),
            "eos_token_id": end_id,
            "sep_token_id": end_id,
        },
        "vision_config": {
            "model_type": "blip_vision_model",
            **{there: getattr(shape, ours) for ours, (there, _) in VISION_FIELDS.items()},
            "hidden_act": "gelu",
            "image_size": image_size,
            "layer_norm_eps": config.image.norm_eps or TIMM_EPS,
        },
    }


def _refuse_others(config: ModelConfig, form: Form) -> None:
    text = config.text
    every = tuple(range(text.layers))
    wanted = {
        "text.token_types": (text.token_types, False),
        "text.separate_causal_attention": (text.separate_causal_attention, False),
        "text.cross_attention": (text.cross_attention, every if text.cross_attention or form.decodes else ()),
        "fusion": (config.fusion, "full"),
        # transformers puts no other first token than [CLS] before what it does not decode.
        "first_token": ({k: v for k, v in config.first_token.items() if k != "decoder"}, {}),
    }
    if "contrastive" in form.heads:
        pooler = form is BLIP_MODEL
        wanted["text_pool"] = (config.text_pool, "pooler" if pooler else "first")
        wanted["image_pool_norm"] = (config.image_pool_norm, pooler)
        wanted["projection_bias"] = (config.projection_bias, not pooler)
    if form.decodes:
        reads_question = form is QUESTION_ANSWERING
        wanted["decoder"] = (config.decoder, "separate" if reads_question else "shared")
        if reads_question:
            wanted["decoder_reads"] = (config.decoder_reads, "question")
            wanted["decoder_layers"] = (config.decoder_layers, text.layers)
    for name, (got, expected) in wanted.items():
        if got != expected:
            raise CheckpointError(f"model.{name} is {got}, but {form.name} has {expected}; it cannot be converted.")
    absent = [head for head in form.heads if head not in config.heads]
    if absent:
        raise CheckpointError(f"model.heads has no {absent[0]} head, which {form.name} needs; it cannot be converted.")
