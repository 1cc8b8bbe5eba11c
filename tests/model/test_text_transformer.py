"""The text Transformer's own properties; its equality with transformers' BERT is tested in test_convert_bert.py."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vlm.config import TextConfig
from vlm.errors import ConfigError
from vlm.model.attention import CrossMemory, CrossMemoryProjection
from vlm.model.text_transformer import TextTransformer
from vlm.model.vocabulary_head import VocabularyHead

torch.set_num_threads(1)  # faster for shapes as small as these
CONFIG = TextConfig(
    vocab_size=40,
    dim=16,
    heads=2,
    layers=4,
    feed_forward_dim=32,
    max_positions=20,
    cross_attention=(2, 3),
    dropout=0.0,
)


def _model(config: TextConfig = CONFIG) -> TextTransformer:
    torch.manual_seed(0)
    model = TextTransformer(config).double().eval()
    for name, parameter in model.named_parameters():  # BERT's start is too flat to tell a wrong mask
        torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.3)
    return model


@torch.no_grad()
def _memory(rows: int = 3) -> CrossMemory:
    torch.manual_seed(1)
    projection = CrossMemoryProjection(2, 16, 6, 2).double()
    for parameter in projection.parameters():
        torch.nn.init.normal_(parameter)
    result: CrossMemory = projection(torch.randn(rows, 5, 6, dtype=torch.float64))
    return result


IDS = torch.randint(1, 40, (3, 8), generator=torch.Generator().manual_seed(2))
MASK = torch.arange(8) < torch.tensor([8, 5, 2])[:, None]


def _cached(model: TextTransformer, steps: list[int], memory: CrossMemory) -> Tensor:
    cache, out, start = model.new_cache(len(IDS), 8), [], 0
    for count in steps:
        ids = IDS[:, start : start + count]
        out.append(model(model.embed(ids, cache.offset), memory=memory, causal=True, cache=cache))
        start += count
    return torch.cat(out, 1)


@pytest.mark.parametrize("steps", [[8], [1] * 8, [3, 1, 1, 2, 1]])
@torch.no_grad()
def test_cached_equals_uncached(steps: list[int]) -> None:
    model, memory = _model(), _memory()
    expected = model(model.embed(IDS), memory=memory, causal=True)
    torch.testing.assert_close(_cached(model, steps, memory), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_padding_in_the_cache_changes_nothing() -> None:
    model, memory = _model(), _memory()
    more = torch.randint(1, 40, (3, 4))
    cache = model.new_cache(3, 12)
    model(model.embed(IDS), MASK, memory, causal=True, cache=cache)
    steps = [
        model(model.embed(more[:, i : i + 1], cache.offset), None, memory, causal=True, cache=cache) for i in range(4)
    ]
    for row, length in enumerate(MASK.sum(1).tolist()):
        ids = torch.cat([IDS[row, :length], more[row]])[None]
        alone = model(model.embed(ids), memory=memory.select(torch.tensor([row])), causal=True)
        torch.testing.assert_close(torch.cat(steps, 1)[row], alone[0, length:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_cache_select_and_reorder_follow_rows() -> None:
    model, memory = _model(), _memory()
    rows = torch.tensor([2, 0, 0])
    states = model.embed(IDS[rows][:, 4:], 4)
    cache = model.new_cache(3, 8)
    model(model.embed(IDS[:, :4]), memory=memory, causal=True, cache=cache)
    chosen = cache.select(torch.cat([rows, rows[:1]]))
    cache.reorder(rows)
    memory = memory.select(rows)
    expected = model(model.embed(IDS[rows]), memory=memory, causal=True)[:, 4:]
    torch.testing.assert_close(model(states, memory=memory, causal=True, cache=cache), expected, rtol=0, atol=1e-12)
    four = torch.tensor([0, 1, 2, 0])
    result = model(states[four], memory=memory.select(four), causal=True, cache=chosen)
    torch.testing.assert_close(result, expected[four], rtol=0, atol=1e-12)


def test_padding_has_no_influence_and_later_tokens_none_in_causal_mode() -> None:
    model, memory = _model(), _memory()
    garbage = torch.where(MASK, IDS, 7)
    for causal in (False, True):
        first, second = (model(model.embed(ids), MASK, memory, causal=causal) for ids in (IDS, garbage))
        torch.testing.assert_close(first[MASK], second[MASK], rtol=0, atol=1e-12)
    # Padding at the end of a causal text needs no mask.
    unmasked = model(model.embed(garbage), memory=memory, causal=True)
    torch.testing.assert_close(unmasked[MASK], first[MASK], rtol=0, atol=1e-12)
    changed = IDS.clone()
    changed[:, 5:] = 3
    early, late = (model(model.embed(ids), memory=memory, causal=True) for ids in (IDS, changed))
    torch.testing.assert_close(early[:, :5], late[:, :5], rtol=0, atol=1e-12)
    assert (early[:, 5:] - late[:, 5:]).abs().max() > 1e-3


def test_layers_run_in_parts_and_cross_attention_is_skipped_without_a_memory() -> None:
    model, memory = _model(), _memory()
    whole = model(model.embed(IDS), MASK, memory)
    below = model(model.embed(IDS), MASK, last=2)
    assert torch.equal(model(below, MASK, memory, first=2), whole)
    plain = replace(CONFIG, cross_attention=())
    text_only = TextTransformer(plain).double().eval()
    text_only.load_state_dict({k: v for k, v in model.state_dict().items() if "cross" not in k})
    assert torch.equal(model(model.embed(IDS), MASK), text_only(text_only.embed(IDS), MASK))


def test_separate_causal_attention_is_used_in_causal_mode_only() -> None:
    model, memory = _model(replace(CONFIG, separate_causal_attention=True)), _memory()

    def touched(causal: bool, name: str) -> set[bool]:
        model.zero_grad()
        model(model.embed(IDS), MASK, memory, causal=causal).sum().backward()
        return {p.grad is not None for n, p in model.named_parameters() if f".{name}" in n}

    assert touched(True, "causal_self_") == {True}
    assert touched(True, "self_") == {False}
    assert touched(False, "causal_self_") == {False}
    assert touched(False, "self_") == {True}


def test_checkpointing_changes_neither_results_nor_gradients() -> None:
    model, memory = _model(), _memory()
    gradients = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        result = model(model.embed(IDS), MASK, memory, causal=True)
        result.square().sum().backward()
        gradients.append([result, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_starts_with_words_as_bert() -> None:
    model = TextTransformer(replace(CONFIG, dim=64, vocab_size=400))
    words = model.word_embedding
    assert words[0].abs().max() == 0
    assert abs(words[1:].std().item() - 0.02) < 0.001
    assert model.layers[0].self_attention.query.bias.abs().max() == 0
    assert torch.equal(model.layers[3].cross_norm.weight, torch.ones(64))


@pytest.mark.parametrize("width", [64, 128, 384])
@torch.no_grad()
def test_a_new_stack_s_first_token_depends_on_words_and_image_together(width: int) -> None:
    """Matching has nothing else to go by: words and images occur as often in wrong pairs as in right ones. With 0.02 for all weights that share of
    the first token's variance is 1e-6 at width 64 and 2e-5 at 384.
    """
    torch.manual_seed(0)
    heads = width // 32
    small = replace(CONFIG, dim=width, heads=heads, layers=2, feed_forward_dim=2 * width, cross_attention=(0, 1))
    model, projection = TextTransformer(small).eval(), CrossMemoryProjection(2, width, 192, heads)
    texts, images = torch.randint(4, 40, (16, 8)), torch.randn(16, 16, 192)
    texts[:, 0] = 2
    pairs = torch.arange(256)
    states = model(model.embed(texts[pairs % 16]), None, projection(images).select(pairs // 16))[:, 0].unflatten(
        0, (16, 16)
    )
    states = states - states.mean((0, 1))
    of_image, of_words = states.mean(1, keepdim=True), states.mean(0, keepdim=True)
    together = states - of_image - of_words
    image, words, both = (
        part.square().sum(2).mean() / states.square().sum(2).mean() for part in (of_image, of_words, together)
    )
    assert min(image, words) > 0.1, "neither drowns the other"
    assert both > 1e-3


def test_vocabulary_head_shares_the_word_embedding() -> None:
    model, head = _model(), VocabularyHead(CONFIG).double()
    head(model(model.embed(IDS)), model.word_embedding).sum().backward()
    assert model.word_embedding.grad is not None
    assert sum(p.numel() for p in head.parameters()) == 16 * 16 + 3 * 16 + 40


def test_errors_name_what_to_change() -> None:
    model = _model()
    with pytest.raises(ConfigError, match="25 tokens do not fit max_positions=20"):
        model.embed(torch.ones(1, 25, dtype=torch.long))
    with pytest.raises(ConfigError, match="30 tokens do not fit max_positions=20"):
        model.new_cache(2, 30)
    with pytest.raises(ConfigError, match=r"cross_attention names layers \[4\]"):
        TextTransformer(replace(CONFIG, cross_attention=(4,)))
    with pytest.raises(ConfigError, match="activation='swish' is not known; choose one of gelu"):
        TextTransformer(replace(CONFIG, activation="swish"))
    cache = model.new_cache(3, 4)
    with pytest.raises(ValueError, match="do not fit a cache of 3 rows and 4 positions"):
        model(model.embed(IDS), causal=True, cache=cache)
