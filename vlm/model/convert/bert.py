"""BERT's weights under our names and back: BertModel, BertForMaskedLM and BertLMHeadModel (decoder with cross-attention) of transformers.

The tables below are the whole mapping; each name stands for its `.weight` and `.bias`. Numbers are never changed, only names.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlm.config import TextConfig
from vlm.errors import CheckpointError
from vlm.model.attention import CrossMemoryProjection
from vlm.model.convert.pickled import read_pickled
from vlm.model.text_transformer import TextTransformer
from vlm.model.vocabulary_head import VocabularyHead

EMBEDDINGS = {
    "embeddings.word_embeddings": "embeddings.word",
    "embeddings.position_embeddings": "embeddings.position",
    "embeddings.token_type_embeddings": "embeddings.token_type",
    "embeddings.LayerNorm": "embeddings.norm",
}
# Behind "encoder.layer.N." there, behind "layers.N." here.
LAYER = {
    "attention.self.query": "self_attention.query",
    "attention.self.key": "self_attention.key",
    "attention.self.value": "self_attention.value",
    "attention.output.dense": "self_attention.output",
    "attention.output.LayerNorm": "self_norm",
    "crossattention.self.query": "cross_attention.query",
    "crossattention.output.dense": "cross_attention.output",
    "crossattention.output.LayerNorm": "cross_norm",
    "intermediate.dense": "feed_forward.inner",
    "output.dense": "feed_forward.outer",
    "output.LayerNorm": "feed_forward_norm",
}
# Behind "encoder.layer.N." there; in front of ".S", the layer's place among those with cross-attention, here, in the `CrossMemoryProjection`.
MEMORY = {"crossattention.self.key": "keys", "crossattention.self.value": "values"}
HEAD = {
    "cls.predictions.transform.dense": "transform",
    "cls.predictions.transform.LayerNorm": "norm",
}
# The vocabulary head's bias; the output matrix is the word embedding, which transformers may store a second time.
HEAD_BIAS, HEAD_BIAS_COPY, HEAD_MATRIX = (
    "cls.predictions.bias",
    "cls.predictions.decoder.bias",
    "cls.predictions.decoder.weight",
)
# Parts that have no place here: BERT's pooler and next-sentence head, and a buffer of position numbers.
LEFT_OUT = re.compile(r"pooler\.|cls\.seq_relationship\.|embeddings\.(position_ids|token_type_ids)$")
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True)
class TextWeights:
    """State dicts for a `TextTransformer`, the `CrossMemoryProjection` of its stack and a `VocabularyHead`; empty where the source has none.

    left_out: names of the source that have no place here.
    """

    transformer: dict[str, Tensor]
    memory: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def cross_attention_layers(names: Iterable[str]) -> tuple[int, ...]:
    """Indices of the layers with cross-attention, from either side's parameter names."""
    found = (re.search(r"layers?\.(\d+)\.cross_?attention\.", name) for name in names)
    return tuple(sorted({int(match[1]) for match in found if match}))


def from_bert_state_dict(state: dict[str, Tensor]) -> TextWeights:
    """BERT's names to ours. Accepts the prefix `bert.` and the `gamma`, `beta` of the first releases.

    Raises CheckpointError for a name that is not BERT's, and for a vocabulary head whose matrix is not the word embedding.
    """
    state = {_modern(name): tensor for name, tensor in state.items()}
    slots = {layer: slot for slot, layer in enumerate(cross_attention_layers(state))}
    weights = TextWeights({}, {}, {}, tuple(name for name in state if LEFT_OUT.match(name)))
    unknown = []
    for name, tensor in state.items():
        if name in weights.left_out or name in (HEAD_BIAS_COPY, HEAD_MATRIX):
            continue
        target = _ours(name, weights, slots)
        if target is None:
            unknown.append(name)
        else:
            part, ours = target
            part[ours] = tensor
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} names are not those of BERT's absolute-position layers, the first {unknown[0]!r}; "
            "convert BertModel, BertForMaskedLM or BertLMHeadModel."
        )
    if "bias" not in weights.head and HEAD_BIAS_COPY in state:
        weights.head["bias"] = state[HEAD_BIAS_COPY]
    matrix = state.get(HEAD_MATRIX)
    # Files hold one of the two, or both.
    if matrix is not None and not torch.equal(matrix, weights.transformer.setdefault("embeddings.word.weight", matrix)):
        raise CheckpointError(
            "the vocabulary head's matrix differs from the word embedding; only tied heads can be converted."
        )
    return weights


def _modern(name: str) -> str:
    name = name.removeprefix("bert.")
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _ours(name: str, weights: TextWeights, slots: dict[int, int]) -> tuple[dict[str, Tensor], str] | None:
    """Where a foreign name goes: the part, and the name in it."""
    if name == HEAD_BIAS:
        return weights.head, "bias"
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if module in EMBEDDINGS:
        return weights.transformer, f"{EMBEDDINGS[module]}.{kind}"
    if module in HEAD:
        return weights.head, f"{HEAD[module]}.{kind}"
    match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module)
    if match and match[2] in LAYER:
        return weights.transformer, f"layers.{match[1]}.{LAYER[match[2]]}.{kind}"
    if match and match[2] in MEMORY:
        return weights.memory, f"{MEMORY[match[2]]}.{slots[int(match[1])]}.{kind}"
    return None


def to_bert_state_dict(weights: TextWeights, prefix: str | None = None) -> dict[str, Tensor]:
    """Our names to BERT's, the inverse of `from_bert_state_dict` except for what that left out.

    prefix: None takes transformers' own: `bert.` beside a vocabulary head (BertForMaskedLM, BertLMHeadModel), nothing without (BertModel).
    """
    if prefix is None:
        prefix = "bert." if weights.head else ""
    layers = cross_attention_layers(weights.transformer)
    embeddings, layer, memory, head = (_inverse(table) for table in (EMBEDDINGS, LAYER, MEMORY, HEAD))
    state: dict[str, Tensor] = {}
    for name, tensor in weights.transformer.items():
        module, _, kind = name.rpartition(".")
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
        foreign = f"encoder.layer.{match[1]}.{layer[match[2]]}" if match else embeddings[module]
        state[f"{prefix}{foreign}.{kind}"] = tensor
    for name, tensor in weights.memory.items():
        side, slot, kind = name.split(".")
        state[f"{prefix}encoder.layer.{layers[int(slot)]}.{memory[side]}.{kind}"] = tensor
    for name, tensor in weights.head.items():
        if name == "bias":
            state[HEAD_BIAS] = state[HEAD_BIAS_COPY] = tensor
        else:
            module, _, kind = name.rpartition(".")
            state[f"{head[module]}.{kind}"] = tensor
    if weights.head:
        state[HEAD_MATRIX] = weights.transformer["embeddings.word.weight"]
    return state


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {ours: foreign for foreign, ours in table.items()}


def trim_vocabulary(weights: TextWeights, kept_ids: Tensor) -> TextWeights:
    """Keeps the tokens `kept_ids` (V',) int64, in that order: rows of the word embedding and of the vocabulary head's bias."""
    words = weights.transformer["embeddings.word.weight"]
    if len(kept_ids) and not 0 <= int(kept_ids.min()) <= int(kept_ids.max()) < len(words):
        raise ValueError(
            f"kept_ids reach from {int(kept_ids.min())} to {int(kept_ids.max())}, but the vocabulary has {len(words)} tokens; "
            "the tokenizer belongs to other weights."
        )
    transformer = {**weights.transformer, "embeddings.word.weight": words[kept_ids]}
    head = {name: tensor[kept_ids] if name == "bias" else tensor for name, tensor in weights.head.items()}
    return TextWeights(transformer, weights.memory, head, weights.left_out)


def load_bert_folder(path: str | Path) -> tuple[dict[str, Any], TextWeights]:
    """Reads a folder as transformers saves it: fields of `TextConfig` and the weights under our names.

    Reads `config.json` and `model.safetensors`, else `pytorch_model.bin` (with weights_only).

    Raises CheckpointError where a file is missing or damaged, and where names or shapes are not those of the model in config.json.
    """
    folder = Path(path)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"{config_file} does not exist; give a folder with config.json and model.safetensors of a BERT."
        )
    try:
        foreign = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{config_file} is not valid JSON ({error}); download the folder again.") from error
    fields = _config_fields(foreign, config_file)
    weights = from_bert_state_dict(_read_weights(folder))
    words = weights.transformer.get("embeddings.word.weight")
    if words is None or tuple(words.shape) != (fields["vocab_size"], fields["dim"]):
        got = "no word embedding" if words is None else f"a word embedding of shape {tuple(words.shape)}"
        raise CheckpointError(
            f"{folder} holds {got}, but its config.json says {(fields['vocab_size'], fields['dim'])}; the files do not belong together."
        )
    fields["cross_attention"] = cross_attention_layers(weights.transformer)
    _check_complete(weights, fields, folder)
    return fields, weights


def _check_complete(weights: TextWeights, fields: dict[str, Any], folder: Path) -> None:
    """Compares names and shapes with those of the model that the fields of `TextConfig` describe.

    Raises CheckpointError with the first that are missing, unexpected or of another shape.
    """
    try:
        expected, found = (to_bert_state_dict(parts, "") for parts in (_described(weights, fields), weights))
    except Exception as error:  # a damaged value can show itself anywhere
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"{folder}: cannot be used ({reason}); download the folder again.") from None
    misshapen = [name for name in expected if name in found and found[name].shape != expected[name].shape]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", [name for name in expected if name not in found]),
            ("unexpected", [name for name in found if name not in expected]),
            (
                "of another shape",
                [f"{n} {tuple(found[n].shape)} instead of {tuple(expected[n].shape)}" for n in misshapen],
            ),
        )
        if names
    ]
    if parts:
        raise CheckpointError(
            f"{folder}: the weights are not those of the BERT in its config.json: {'; '.join(parts)}; download the folder again."
        )


def _described(weights: TextWeights, fields: dict[str, Any]) -> TextWeights:
    """State dicts without storage of the model that has the parts of `weights`."""
    config = TextConfig(**fields)
    memory_dim = next((t.shape[-1] for name, t in weights.memory.items() if name.endswith("weight")), config.dim)
    with torch.device("meta"):
        stack = TextTransformer(config)
        memory = CrossMemoryProjection(len(config.cross_attention), config.dim, memory_dim, config.heads)
        head = VocabularyHead(config) if weights.head else None
    return TextWeights(stack.state_dict(), memory.state_dict(), {} if head is None else head.state_dict())


def _config_fields(foreign: dict[str, Any], file: Path) -> dict[str, Any]:
    """BertConfig's entries as fields of `TextConfig`; what is absent has BertConfig's default."""
    expected = {"model_type": ("bert",), "position_embedding_type": ("absolute",), "type_vocab_size": (2,)}
    for key, allowed in {**expected, "hidden_act": tuple(ACTIVATIONS)}.items():
        if foreign.get(key, allowed[0]) not in allowed:
            raise CheckpointError(
                f"{file}: {key} is {foreign[key]!r}, expected {' or '.join(map(repr, allowed))}; choose a BERT model."
            )
    return {
        "vocab_size": foreign.get("vocab_size", 30522),
        "dim": foreign.get("hidden_size", 768),
        "heads": foreign.get("num_attention_heads", 12),
        "layers": foreign.get("num_hidden_layers", 12),
        "feed_forward_dim": foreign.get("intermediate_size", 3072),
        "max_positions": foreign.get("max_position_embeddings", 512),
        "norm_eps": foreign.get("layer_norm_eps", 1e-12),
        "token_types": True,
        "dropout": foreign.get("hidden_dropout_prob", 0.1),
        "attention_dropout": foreign.get("attention_probs_dropout_prob", 0.1),
        "pad_id": foreign.get("pad_token_id", 0),
        "activation": ACTIVATIONS[foreign.get("hidden_act", "gelu")],
    }


def _read_weights(folder: Path) -> dict[str, Tensor]:
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    file = safe if safe.is_file() else pickled
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has neither {safe.name} nor {pickled.name}; download one of them beside config.json."
        )
    if file == pickled:
        return read_pickled(file)
    try:
        return dict(load_file(file))
    except Exception as error:  # safetensors raises many kinds; for the user they are one
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} cannot be read ({reason}); download it again.") from error
