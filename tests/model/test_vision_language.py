"""The way between the parts: both kinds of fusion, both decoders, padding, caches, joined passes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.config import ModelConfig, ObjectivesConfig
from vlm.data.batch import Batch
from vlm.errors import ConfigError
from vlm.model.initialise import decoder_from_fusion
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Pass
from vlm.tasks.pretraining import Pretraining

MakeModel = Callable[..., VisionLanguageModel]
FULL: dict[str, Any] = {"fusion": "full"}
LATE: dict[str, Any] = {"fusion": "late", "text": {"cross_attention": (2, 3)}}
SEPARATE: dict[str, Any] = {**LATE, "decoder": "separate", "decoder_layers": 2}
BLIP: dict[str, Any] = {"fusion": "full", "text": {"separate_causal_attention": True}}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def pixels(model: VisionLanguageModel, batch: Batch) -> Tensor:
    return model.encode_image(batch.images).tokens


@pytest.mark.parametrize("settings", [FULL, LATE, SEPARATE, BLIP])
@torch.no_grad()
def test_shapes(tiny_model: MakeModel, batch: Batch, settings: dict[str, Any]) -> None:
    model = tiny_model(**settings)
    image = model.encode_image(batch.images)
    text = model.encode_text(batch.texts.ids, batch.texts.mask)
    assert image.tokens.shape == (4, 5, 64)
    assert image.embedding.shape == (4, 16)
    assert text.states is not None
    assert text.states.shape == (4, 8, 32)
    assert text.embedding is not None
    for embedding in (image.embedding, text.embedding):
        close(embedding.norm(dim=1), torch.ones(4, dtype=torch.float64))
    states = model.fuse(text, model.memory(image.tokens, None, "fusion"))
    assert states.shape == (4, 8, 32)
    assert model.matching_logits(states).shape == (4, 2)
    assert model.masked_language_logits(states).shape == (4, 8, 64)
    assert model.decode(batch.texts.ids, model.memory(image.tokens, None, "decoder")).shape == (4, 8, 64)


@torch.no_grad()
def test_text_of_late_fusion_is_that_of_the_first_layers(tiny_model: MakeModel, batch: Batch) -> None:
    model, texts = tiny_model(**LATE), batch.texts
    memory = model.memory(pixels(model, batch), None, "fusion")
    encoded = model.encode_text(texts.ids, texts.mask)
    assert encoded.states is not None
    close(encoded.states, model.text(model.text.embed(texts.ids), texts.mask, last=2))
    # The whole: two layers without the image, two with it.
    expected = model.text(model.text(model.text.embed(texts.ids), texts.mask, last=2), texts.mask, memory, first=2)
    close(model.fuse(encoded, memory), expected)
    close(model.fuse(model.text_view(texts.ids, texts.mask), memory), expected)
    with pytest.raises(ValueError, match="late fusion continues from the text's states"):
        model.fuse(replace(encoded, states=None), memory)


@torch.no_grad()
def test_full_fusion_starts_from_the_tokens(tiny_model: MakeModel, batch: Batch) -> None:
    model, texts = tiny_model(**FULL), batch.texts
    memory = model.memory(pixels(model, batch), None, "fusion")
    encoded = model.encode_text(texts.ids, texts.mask)
    assert encoded.states is not None
    close(encoded.states, model.text(model.text.embed(texts.ids), texts.mask))
    assert model.text_view(texts.ids, texts.mask).states is None
    expected = model.text(model.text.embed(texts.ids), texts.mask, memory)
    close(model.fuse(encoded, memory), expected)
    close(model.fuse(model.text_view(texts.ids, texts.mask), memory), expected)
    assert (encoded.states - expected).abs().max() > 0.1  # the image changes it


@pytest.mark.parametrize("settings", [FULL, LATE, SEPARATE, BLIP])
@pytest.mark.parametrize("pool", ["first", "mean"])
@torch.no_grad()
def test_padding_changes_nothing_at_the_words(
    tiny_model: MakeModel, batch: Batch, settings: dict[str, Any], pool: str
) -> None:
    model, texts = tiny_model(**settings, text_pool=pool), batch.texts
    tokens = pixels(model, batch)
    fusion, decoder = (model.memory(tokens, None, stack) for stack in ("fusion", "decoder"))  # type: ignore[arg-type]
    encoded = model.encode_text(texts.ids, texts.mask)
    fused, decoded = model.fuse(encoded, fusion), model.decode(texts.ids, decoder)
    lengths = texts.mask.sum(1).tolist()
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        own, ids, mask = torch.tensor([row]), texts.ids[row, None, :length], texts.mask[row, None, :length]
        alone = model.encode_text(ids, mask)
        assert alone.states is not None
        assert encoded.states is not None
        assert alone.embedding is not None
        assert encoded.embedding is not None
        close(encoded.embedding[row], alone.embedding[0])
        close(encoded.states[row, :length], alone.states[0])
        close(fused[row, :length], model.fuse(alone, fusion.select(own))[0])
        close(decoded[row, :length], model.decode(ids, decoder.select(own))[0])


@torch.no_grad()
def test_the_texts_embedding_is_its_first_token_or_the_mean_of_its_tokens(tiny_model: MakeModel, batch: Batch) -> None:
    texts = batch.texts
    for pool in ("first", "mean"):
        model = tiny_model(**LATE, text_pool=pool)
        encoded = model.encode_text(texts.ids, texts.mask)
        assert encoded.states is not None
        assert encoded.embedding is not None
        for row, length in enumerate(texts.mask.sum(1).tolist()):
            pooled = encoded.states[row, 0] if pool == "first" else encoded.states[row, :length].mean(0)
            projected = model.text_projection(pooled)
            close(encoded.embedding[row], projected / projected.norm())


@pytest.mark.parametrize("settings", [FULL, LATE, SEPARATE, BLIP])
@torch.no_grad()
def test_decoding_with_a_cache_equals_decoding_without(
    tiny_model: MakeModel, batch: Batch, settings: dict[str, Any]
) -> None:
    model = tiny_model(**settings, first_token={"decoder": 9})
    memory = model.memory(pixels(model, batch), None, "decoder")
    expected = model.decode(batch.texts.ids, memory)
    cache, parts, start = model.new_cache(4, 8), [], 0
    for count in (2, 1, 3, 1, 1):
        parts.append(model.decode(batch.texts.ids[:, start : start + count], memory, cache))
        start += count
    close(torch.cat(parts, 1), expected)
    changed = batch.texts.ids.clone()
    changed[:, 5] = 6
    close(model.decode(changed, memory)[:, :5], expected[:, :5])  # no token sees a later one
    assert (model.decode(changed, memory)[:, 5:] - expected[:, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("stack", ["fusion", "decoder"])
@torch.no_grad()
def test_selecting_memory_equals_projecting_the_selected_rows(tiny_model: MakeModel, batch: Batch, stack: str) -> None:
    model, rows = tiny_model(**SEPARATE), torch.tensor([2, 0, 0, 3, 2])
    tokens, mask = pixels(model, batch), torch.arange(5) < torch.tensor([5, 4, 3, 2])[:, None]
    selected = model.memory(tokens, mask, stack).select(rows)  # type: ignore[arg-type]
    projected = model.memory(tokens[rows], mask[rows], stack)  # type: ignore[arg-type]
    assert len(selected) == len(projected) == 5
    for found, expected in zip((*selected.keys, *selected.values), (*projected.keys, *projected.values), strict=True):
        close(found, expected)
    assert selected.mask is not None
    assert torch.equal(selected.mask, mask[rows])


@torch.no_grad()
def test_the_first_token_is_replaced_by_mode(tiny_model: MakeModel, batch: Batch) -> None:
    plain, model = tiny_model(**FULL), tiny_model(**FULL, first_token={"fused": 7, "decoder": 8})
    texts, tokens = batch.texts, pixels(plain, batch)
    memory = plain.memory(tokens, None, "fusion")

    def starting_with(token: int) -> Tensor:
        return torch.cat([torch.full_like(texts.ids[:, :1], token), texts.ids[:, 1:]], 1)

    def encode(m: VisionLanguageModel, ids: Tensor) -> Tensor:
        states = m.encode_text(ids, texts.mask).states
        assert states is not None
        return states

    def fuse(m: VisionLanguageModel, ids: Tensor) -> Tensor:
        return m.fuse(m.text_view(ids, texts.mask), memory)

    close(encode(model, texts.ids), encode(plain, texts.ids))  # this mode keeps [CLS]
    close(fuse(model, texts.ids), fuse(plain, starting_with(7)))
    close(model.decode(texts.ids, memory), plain.decode(starting_with(8), memory))
    other = tiny_model(**FULL, first_token={"text": 9})
    close(encode(other, texts.ids), encode(plain, starting_with(9)))


@pytest.mark.parametrize("settings", [FULL, LATE, SEPARATE, BLIP])
@torch.no_grad()
def test_joined_passes_equal_passes_apart(tiny_model: MakeModel, batch: Batch, settings: dict[str, Any]) -> None:
    model, texts = tiny_model(**settings), batch.texts
    assert batch.masked is not None
    task = Pretraining(model, ObjectivesConfig(captioning=1.0))
    features = task.features(batch)
    rows, others = torch.arange(4), torch.tensor([1, 2, 3, 0])
    passes = [
        Pass(rows, rows),
        Pass(rows, rows, causal=True),
        Pass(others, rows),
        Pass(rows, rows, view="masked"),
        Pass(rows[:2], others[:2]),
    ]
    found = task._run(passes, features)
    tokens = pixels(model, batch)
    fusion, decoder = (model.memory(tokens, None, stack) for stack in ("fusion", "decoder"))  # type: ignore[arg-type]

    def fuse(ids: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        return model.fuse(model.text_view(ids, mask), fusion.select(images))

    expected = [
        fuse(texts.ids, texts.mask, rows),
        model.decode_states(texts.ids, decoder),
        fuse(texts.ids[others], texts.mask[others], rows),
        fuse(batch.masked.ids, texts.mask, rows),
        fuse(texts.ids[:2], texts.mask[:2], others[:2]),
    ]
    for one, other in zip(found, expected, strict=True):
        close(one, other)


@torch.no_grad()
def test_a_separate_decoder_started_from_the_fusion_layers_equals_them(tiny_model: MakeModel, batch: Batch) -> None:
    model = tiny_model(**SEPARATE)
    assert model.decoder is not None
    assert model.decoder_memory is not None
    tokens = pixels(model, batch)
    states = torch.randn(4, 8, 32, dtype=torch.float64)

    def difference() -> float:
        assert model.decoder is not None
        own = model.decoder(states, None, model.memory(tokens, None, "decoder"), causal=True)
        fusion = model.text(states, None, model.memory(tokens, None, "fusion"), causal=True, first=2)
        return float((own - fusion).abs().max())

    assert difference() > 0.1
    decoder_from_fusion(model)
    assert difference() == 0
    close(model.decoder.embed(batch.texts.ids), model.text.embed(batch.texts.ids))


@torch.no_grad()
def test_a_decoder_that_reads_the_question_keeps_a_memory_of_its_own_width(tiny_model: MakeModel, batch: Batch) -> None:
    model = tiny_model(**SEPARATE, decoder_reads="question")
    assert model.decoder_memory is not None
    before = model.decoder_memory.keys[0].weight.clone()
    decoder_from_fusion(model)  # widths differ (64 and 32), so it keeps its start
    assert torch.equal(model.decoder_memory.keys[0].weight, before)
    question = torch.randn(4, 6, 32, dtype=torch.float64)
    assert model.decode(batch.texts.ids, model.memory(question, None, "decoder")).shape == (4, 8, 64)


@torch.no_grad()
def test_what_the_decoder_must_not_attend_to_has_no_influence(tiny_model: MakeModel, batch: Batch) -> None:
    model = tiny_model(**SEPARATE, decoder_reads="question")
    question, mask = torch.randn(4, 6, 32, dtype=torch.float64), torch.arange(6) < torch.tensor([6, 2, 3, 4])[:, None]
    noise = torch.where(mask[..., None], question, 100.0)
    expected = model.decode(batch.texts.ids, model.memory(question, mask, "decoder"))
    close(model.decode(batch.texts.ids, model.memory(noise, mask, "decoder")), expected)


def test_causal_attention_of_its_own_serves_the_decoder_only(tiny_model: MakeModel, batch: Batch) -> None:
    model = tiny_model(**BLIP)
    memory = model.memory(pixels(model, batch), None, "fusion")
    own = [p for name, p in model.text.named_parameters() if "causal_self" in name]
    both = [p for name, p in model.text.named_parameters() if ".self_attention" in name]
    assert own
    fused = model.fuse(model.text_view(batch.texts.ids, batch.texts.mask), memory).sum()
    assert all(g is None for g in torch.autograd.grad(fused, own, retain_graph=True, allow_unused=True))
    decoded = model.decode(batch.texts.ids, memory).sum()
    assert all(g is None for g in torch.autograd.grad(decoded, both, retain_graph=True, allow_unused=True))
    assert any(g.abs().max() > 0 for g in torch.autograd.grad(decoded, own))


def test_the_temperature_keeps_to_its_bounds(tiny_model: MakeModel) -> None:
    model = tiny_model()
    for value, expected in ((-1.0, 0.001), (0.0001, 0.001), (0.2, 0.2), (3.0, 0.5)):
        with torch.no_grad():
            model.temperature.fill_(value)
        model.clamp_temperature()
        assert model.temperature.item() == expected


def test_late_fusion_without_cross_attention_is_refused(tiny_config: Callable[..., ModelConfig]) -> None:
    with pytest.raises(ConfigError, match="cross_attention is empty"):
        VisionLanguageModel(tiny_config(text={"cross_attention": ()}, fusion="late"))
