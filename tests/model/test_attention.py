"""Attention equals its definition and torch's own module; masked keys have no influence; memories are shared without being copied."""

import pytest
import torch
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.model import attention
from vlm.model.attention import Attention, CrossAttention, CrossMemory, CrossMemoryProjection, attention_mask
from vlm.model.text_cache import TextCache

torch.set_num_threads(1)  # faster for shapes as small as these
B, L, D, H, P = 3, 6, 12, 3, 5


def _mask(rows: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(rows)[:, None]


def _naive(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """One query at a time; q, k, v: (B, H, L, E); allowed: (B, L, K)."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = allowed[b, i].nonzero().squeeze(1)
        weights = torch.softmax(k[b, h, keys] @ q[b, h, i] / q.shape[-1] ** 0.5, dim=0)
        out[b, h, i] = weights @ v[b, h, keys]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_equals_the_definition(causal: bool, padded: bool, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "_prefers_plain", lambda query: plain)
    module = Attention(D, H).double().eval()
    x = torch.randn(B, L, D, dtype=torch.float64)
    mask = _mask([6, 4, 2], L) if padded else None
    allowed = torch.ones(B, L, L, dtype=torch.bool) if mask is None else mask[:, None].expand(B, L, L)
    if causal:
        allowed = allowed & torch.ones(L, L, dtype=torch.bool).tril()
    q, k, v = (part(x).view(B, L, H, D // H).transpose(1, 2) for part in (module.query, module.key, module.value))
    expected = module.output(_naive(q, k, v, allowed).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, mask, causal), expected, rtol=0, atol=1e-12)


def test_equals_torch_multihead_attention() -> None:
    torch.manual_seed(0)
    module, reference = Attention(D, H).double(), nn.MultiheadAttention(D, H, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([module.query.weight, module.key.weight, module.value.weight]))
        reference.in_proj_bias.copy_(torch.cat([module.query.bias, module.key.bias, module.value.bias]))
        reference.out_proj.load_state_dict(module.output.state_dict())
    x, mask = torch.randn(B, L, D, dtype=torch.float64), _mask([6, 4, 2], L)
    expected, expected_weights = reference(x, x, x, key_padding_mask=~mask, average_attn_weights=False)
    result, weights = module(x, mask, return_weights=True)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x, mask), expected, rtol=0, atol=1e-12)


def test_plain_and_fused_agree_with_gradients_in_bf16_training(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = Attention(D, H)
    x, mask = torch.randn(B, L, D), _mask([6, 4, 2], L)
    results = []
    for plain in (True, False):
        monkeypatch.setattr(attention, "_prefers_plain", lambda query, plain=plain: plain)
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x, mask, causal=True)
        out.float().square().sum().backward()
        results.append((out.float(), module.key.weight.grad.clone(), module.value.weight.grad.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


def test_plain_attention_has_the_gradients_of_a_softmax_in_fp32() -> None:
    """To half a unit in the last place of bf16, which weights that were rounded before the gradient is taken do not give.

    Keys and values are the identity, and the root of 16 is a power of 2: the query's gradient is the scores' gradient by 4.
    """
    torch.manual_seed(0)
    query, identity = (4 * torch.randn(2, 1, 9, 16)).bfloat16().requires_grad_(), torch.eye(16).bfloat16()
    weights, _ = attention._plain_attention(query, identity, identity, None, 0.0)
    given = torch.randn(weights.shape).bfloat16()
    (found,) = torch.autograd.grad(weights, query, given)
    p, g = (query.detach().double() / 4).softmax(-1), given.double()
    expected = p * (g - (p * g).sum(-1, keepdim=True)) / 4
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


def test_plain_only_in_bf16_training_on_the_cpu() -> None:
    query = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    assert attention._prefers_plain(query)
    assert not attention._prefers_plain(query.float())
    assert not attention._prefers_plain(query.detach())
    with torch.no_grad():
        assert not attention._prefers_plain(query)


@pytest.mark.parametrize("plain", [False, True])
def test_masked_keys_have_no_influence_and_empty_rows_are_finite(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "_prefers_plain", lambda query: plain)
    module = Attention(D, H).eval()
    x, mask = torch.randn(B, L, D), _mask([6, 4, 0], L)
    changed = torch.where(mask[..., None], x, torch.full_like(x, 1e3))
    first, second = module(x, mask), module(changed, mask)
    assert torch.equal(first[mask], second[mask])
    x.requires_grad_()
    result = module(x, mask, causal=True)
    result.sum().backward()
    assert result.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_query_without_keys_may_attend_to_all() -> None:
    mask = attention_mask(_mask([2, 0], 3), False, 1, 3, torch.device("cpu"))
    assert mask is not None
    assert mask[:, 0, 0].tolist() == [[True, True, False], [True, True, True]]


def test_dropout_only_in_training() -> None:
    torch.manual_seed(0)
    module, x = Attention(D, H, dropout=0.5), torch.randn(B, L, D)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("steps", [[6], [1] * 6, [3, 1, 2]])
@torch.no_grad()
def test_cached_equals_uncached(steps: list[int]) -> None:
    torch.manual_seed(0)
    module, x = Attention(D, H).double().eval(), torch.randn(B, L, D, dtype=torch.float64)
    cache, out, start = TextCache(B, L, 1), [], 0
    for count in steps:
        out.append(module(x[:, start : start + count], causal=True, cache=cache.layer(0)))
        cache.advance(count)
        start += count
    torch.testing.assert_close(torch.cat(out, 1), module(x, causal=True), rtol=0, atol=1e-12)


def _memory(rows: int = B) -> tuple[CrossMemoryProjection, CrossMemory]:
    projection = CrossMemoryProjection(2, D, 8, H).double()
    nn.init.normal_(projection.keys[1].weight)
    return projection, projection(torch.randn(rows, P, 8, dtype=torch.float64), _mask([5, 3, 1], P)[:rows])


def test_beams_share_a_memory_exactly() -> None:
    torch.manual_seed(0)
    _, memory = _memory()
    module = CrossAttention(D, H).double().eval()
    x = torch.randn(B * 4, L, D, dtype=torch.float64)
    copied = memory.select(torch.arange(B).repeat_interleave(4))
    torch.testing.assert_close(module(x, memory, 1), module(x, copied, 1), rtol=0, atol=1e-13)
    _, shared_weights = module(x, memory, 1, return_weights=True)
    _, weights = module(x, copied, 1, return_weights=True)
    torch.testing.assert_close(shared_weights, weights, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="10 rows of text cannot share 3 rows of memory"):
        module(x[:10], memory, 1)


def test_select_takes_rows_with_their_mask_and_gradients() -> None:
    torch.manual_seed(0)
    projection, memory = _memory()
    rows = torch.tensor([2, 0, 0, 1])
    chosen = memory.select(rows)
    assert len(chosen) == 4
    assert torch.equal(chosen.values[1], memory.values[1][rows])
    assert memory.mask is not None
    assert torch.equal(chosen.mask, memory.mask[rows])
    chosen.keys[0].sum().backward()
    assert projection.keys[0].weight.grad is not None


def test_an_empty_selection_is_allowed() -> None:
    _, memory = _memory()
    nothing = torch.zeros(0, dtype=torch.long)
    result = CrossAttention(D, H).double()(torch.zeros(0, L, D, dtype=torch.float64), memory.select(nothing), 0)
    assert result.shape == (0, L, D)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="dim=10 cannot be divided among heads=3"):
        Attention(10, 3)


def test_no_mask_where_everything_is_allowed() -> None:
    assert attention_mask(None, False, L, L, torch.device("cpu")) is None
    assert attention_mask(None, True, 1, L, torch.device("cpu")) is None
