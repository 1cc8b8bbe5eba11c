"""Our text Transformer with BERT's weights is transformers' BERT."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, BertModel

from vlm.config import TextConfig
from vlm.errors import CheckpointError
from vlm.model.attention import CrossMemoryProjection
from vlm.model.convert.bert import (
    TextWeights,
    from_bert_state_dict,
    load_bert_folder,
    to_bert_state_dict,
    trim_vocabulary,
)
from vlm.model.text_transformer import TextTransformer
from vlm.model.vocabulary_head import VocabularyHead

torch.set_num_threads(1)  # faster for shapes as small as these
BERT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
DECODER = {"is_decoder": True, "add_cross_attention": True}
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])


def _config(cross: bool) -> TextConfig:
    return TextConfig(
        vocab_size=60,
        dim=24,
        heads=3,
        layers=3,
        feed_forward_dim=40,
        max_positions=32,
        cross_attention=(0, 1, 2) if cross else (),
    )


def _build(kind: type, dtype: torch.dtype, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    model = kind(BertConfig(**{**BERT, **changes})).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def _ours(reference: Any, cross: bool) -> tuple[TextTransformer, CrossMemoryProjection, VocabularyHead, TextWeights]:
    weights = from_bert_state_dict(reference.state_dict())
    dtype = next(reference.parameters()).dtype
    transformer = TextTransformer(_config(cross)).to(dtype).eval()
    projection, head = CrossMemoryProjection(3, 24, 24, 3).to(dtype), VocabularyHead(_config(cross)).to(dtype)
    transformer.load_state_dict(weights.transformer)
    if cross:
        projection.load_state_dict(weights.memory)
    if weights.head:
        head.load_state_dict(weights.head)
    return transformer, projection, head, weights


def _inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < torch.tensor([9, 6, 1, 4])[:, None]
    return torch.randint(1, 60, (4, 9), generator=g).masked_fill(~mask, 0), mask


@PRECISIONS
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_encoder_with_padding(dtype: torch.dtype, tolerance: float, seed: int) -> None:
    reference = _build(BertModel, dtype, seed, add_pooling_layer=False)
    transformer, _, _, _ = _ours(reference, cross=False)
    ids, mask = _inputs(seed)
    expected = reference(ids, attention_mask=mask.long()).last_hidden_state
    result = transformer(transformer.embed(ids), mask)
    torch.testing.assert_close(result[mask], expected[mask], rtol=0, atol=tolerance)


@PRECISIONS
@torch.no_grad()
def test_masked_language_head(dtype: torch.dtype, tolerance: float) -> None:
    reference = _build(BertForMaskedLM, dtype)
    transformer, _, head, _ = _ours(reference, cross=False)
    ids, mask = _inputs(0)
    expected = reference(ids, attention_mask=mask.long()).logits
    result = head(transformer(transformer.embed(ids), mask), transformer.word_embedding)
    torch.testing.assert_close(result[mask], expected[mask], rtol=0, atol=tolerance)


@PRECISIONS
@pytest.mark.parametrize("prefix", [1, 4, 8])
@torch.no_grad()
def test_decoder_with_cross_attention_cached_and_not(dtype: torch.dtype, tolerance: float, prefix: int) -> None:
    reference = _build(BertLMHeadModel, dtype, **DECODER)
    transformer, projection, head, _ = _ours(reference, cross=True)
    ids, mask = _inputs(0)
    image, image_mask = torch.randn(4, 7, 24, dtype=dtype), torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]
    expected = reference(
        ids,
        attention_mask=mask.long(),
        encoder_hidden_states=image,
        encoder_attention_mask=image_mask.long(),
        use_cache=False,
    ).logits
    memory = projection(image, image_mask)
    whole = head(transformer(transformer.embed(ids), mask, memory, causal=True), transformer.word_embedding)
    torch.testing.assert_close(whole[mask], expected[mask], rtol=0, atol=tolerance)
    cache, parts = transformer.new_cache(4, 9), []
    for start, end in [(0, prefix), *((i, i + 1) for i in range(prefix, 9))]:
        states = transformer.embed(ids[:, start:end], cache.offset)
        parts.append(head(transformer(states, None, memory, causal=True, cache=cache), transformer.word_embedding))
    torch.testing.assert_close(torch.cat(parts, 1)[mask], expected[mask], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("kind", "changes"), [(BertModel, {}), (BertForMaskedLM, {}), (BertLMHeadModel, DECODER)])
def test_round_trip_is_bit_identical(kind: type, changes: dict[str, Any]) -> None:
    state = _build(kind, torch.float32, **changes).state_dict()
    weights = from_bert_state_dict(state)
    back = to_bert_state_dict(weights)
    kept = {name for name in state if "pooler" not in name}
    assert set(back) == kept
    assert set(weights.left_out) == set(state) - kept
    assert all(torch.equal(back[name], state[name]) for name in kept)


def test_cross_attention_in_the_last_layers_only() -> None:
    """ALBEF's form: slots of the memory follow the layers that have cross-attention."""
    state = _build(BertLMHeadModel, torch.float32, **DECODER).state_dict()
    state = {name: tensor for name, tensor in state.items() if "layer.0.crossattention" not in name}
    weights = from_bert_state_dict(state)
    assert sorted(weights.memory) == sorted(
        f"{p}.{s}.{k}" for p in ("keys", "values") for s in (0, 1) for k in ("weight", "bias")
    )
    assert torch.equal(weights.memory["keys.0.weight"], state["bert.encoder.layer.1.crossattention.self.key.weight"])
    back = to_bert_state_dict(weights)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_names_of_the_first_releases() -> None:
    state = _build(BertModel, torch.float32).state_dict()
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }
    expected = from_bert_state_dict(state).transformer
    result = from_bert_state_dict({f"bert.{name}": tensor for name, tensor in old.items()}).transformer
    assert set(result) == set(expected)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_trimmed_vocabulary_gives_the_same_logits_for_what_is_kept() -> None:
    reference = _build(BertForMaskedLM, torch.float64)
    transformer, _, head, weights = _ours(reference, cross=False)
    kept = torch.tensor([0, 3, 5, 9, 30, 59])
    small = TextConfig(**{**_config(False).__dict__, "vocab_size": 6})
    trimmed = trim_vocabulary(weights, kept)
    small_transformer, small_head = TextTransformer(small).double().eval(), VocabularyHead(small).double()
    small_transformer.load_state_dict(trimmed.transformer)
    small_head.load_state_dict(trimmed.head)
    ids = torch.tensor([[1, 4, 5, 2]])
    expected = head(transformer(transformer.embed(kept[ids])), transformer.word_embedding)[..., kept]
    result = small_head(small_transformer(small_transformer.embed(ids)), small_transformer.word_embedding)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="the vocabulary has 60 tokens"):
        trim_vocabulary(weights, torch.tensor([60]))


@pytest.mark.parametrize("pickled", [False, True])
@torch.no_grad()
def test_folder_as_transformers_saves_it(tmp_path: Path, pickled: bool) -> None:
    reference = _build(BertModel, torch.float32)
    reference.save_pretrained(tmp_path)
    if pickled:
        (tmp_path / "model.safetensors").unlink()
        torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    fields, weights = load_bert_folder(tmp_path)
    transformer = TextTransformer(TextConfig(**fields)).eval()
    transformer.load_state_dict(weights.transformer)
    ids, mask = _inputs(0)
    expected = reference(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(transformer(transformer.embed(ids), mask)[mask], expected[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
@PRECISIONS
@torch.no_grad()
def test_the_activation_is_that_of_config_json(
    tmp_path: Path, activation: str, dtype: torch.dtype, tolerance: float
) -> None:
    reference = _build(BertForMaskedLM, dtype, hidden_act=activation)
    reference.save_pretrained(tmp_path)
    fields, weights = load_bert_folder(tmp_path)
    config = TextConfig(**fields)
    transformer, head = TextTransformer(config).to(dtype).eval(), VocabularyHead(config).to(dtype)
    transformer.load_state_dict(weights.transformer)
    head.load_state_dict(weights.head)
    ids, mask = _inputs(0)
    expected = reference(ids, attention_mask=mask.long())
    result = head(transformer(transformer.embed(ids), mask), transformer.word_embedding)
    torch.testing.assert_close(result[mask], expected.logits[mask], rtol=0, atol=tolerance)


def test_folder_errors_say_what_to_do(tmp_path: Path) -> None:
    def attempt(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            load_bert_folder(tmp_path)

    attempt(r"config\.json does not exist; give a folder")
    (tmp_path / "config.json").write_text("{")
    attempt("not valid JSON")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    attempt("model_type is 'roberta', expected 'bert'")
    reference = _build(BertModel, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({**BERT, "model_type": "bert"}))
    attempt(r"neither model\.safetensors nor pytorch_model\.bin")
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0 damaged")
    attempt("cannot be read")
    state = reference.state_dict()
    save_file({**state, "encoder.layer.0.rotary.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    attempt("'encoder.layer.0.rotary.weight'")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**BERT, "vocab_size": 61}))
    attempt(r"shape \(60, 24\), but its config\.json says \(61, 24\)")


def test_a_decoder_may_read_states_of_another_width_but_not_of_several(tmp_path: Path) -> None:
    reference = _build(BertLMHeadModel, torch.float32, **DECODER)
    reference.save_pretrained(tmp_path)
    state = {
        name: torch.ones(24, 10) if re.search(r"crossattention\.self\.(key|value)\.weight", name) else tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(state, tmp_path / "model.safetensors")
    fields, weights = load_bert_folder(tmp_path)
    assert fields["cross_attention"] == (0, 1, 2)
    assert weights.memory["values.2.weight"].shape == (24, 10)
    name = "encoder.layer.1.crossattention.self.value.weight"
    save_file({**state, f"bert.{name}": torch.ones(24, 11)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"({name} (24, 11) instead of (24, 10))")):
        load_bert_folder(tmp_path)


def test_an_untied_head_is_refused() -> None:
    state = dict(_build(BertForMaskedLM, torch.float32).state_dict())
    state["cls.predictions.decoder.weight"] = state["cls.predictions.decoder.weight"] + 1
    with pytest.raises(CheckpointError, match="only tied heads"):
        from_bert_state_dict(state)
