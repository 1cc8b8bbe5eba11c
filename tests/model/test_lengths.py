"""Texts that run by length give what they give together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.model.lengths import by_length
from vlm.model.vision_language import VisionLanguageModel


def masks(lengths: list[int], longest: int) -> Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def test_every_text_once_no_longer_than_it_must_be() -> None:
    lengths = [3, 17, 8, 9, 24, 1, 16, 2]
    seen: list[tuple[list[int], int]] = []

    def run(rows: Tensor, length: int) -> Tensor:
        seen.append((rows.tolist(), length))
        return rows[:, None, None].double() * 100 + torch.arange(length)[None, :, None]

    states = by_length(masks(lengths, 24), run, worth=1)
    assert seen == [([0, 2, 5, 7], 8), ([3, 6], 16), ([1, 4], 24)]
    assert states.shape == (8, 24, 1)
    for row, length in enumerate(lengths):
        assert torch.equal(states[row, :length, 0], row * 100 + torch.arange(length).double())


@pytest.mark.parametrize(
    ("lengths", "longest", "calls"), [([5, 5], 5, [5]), ([9, 20], 20, [16, 20]), ([0, 3], 16, [8]), ([], 8, [8])]
)
def test_lengths_that_are_no_multiple_none_and_no_text(lengths: list[int], longest: int, calls: list[int]) -> None:
    seen: list[int] = []

    def run(rows: Tensor, length: int) -> Tensor:
        seen.append(length)
        return torch.ones(len(rows), length, 2)

    mask = masks(lengths, longest) if lengths else torch.zeros(0, longest, dtype=torch.bool)
    assert by_length(mask, run, worth=1).shape == (len(lengths), longest, 2)
    assert seen == calls


def test_a_text_is_as_long_as_its_last_token_whatever_is_masked_before_it() -> None:
    """Answers behind questions of several lengths leave holes: a text of two tokens whose last stands at 17 runs at 24."""
    mask = torch.zeros(3, 32, dtype=torch.bool)
    mask[0, [0, 17]] = mask[1, [3, 4, 5]] = mask[2, [8]] = True
    seen: list[tuple[list[int], int]] = []

    def run(rows: Tensor, length: int) -> Tensor:
        seen.append((rows.tolist(), length))
        return torch.ones(len(rows), length, 1)

    states = by_length(mask, run, worth=1)
    assert seen == [([1], 8), ([2], 16), ([0], 24)]
    assert states[mask].all()


@pytest.mark.parametrize(
    ("worth", "calls"),
    [(16, [(4, 8), (2, 16), (2, 24)]), (33, [(6, 16), (2, 24)]), (80, [(6, 16), (2, 24)]), (81, [(8, 24)])],
)
def test_little_padding_is_computed(worth: int, calls: list[tuple[int, int]]) -> None:
    """4 texts of 8 tokens, 2 of 16 and 2 of 24: the first are 32 tokens of padding at a length of 16, all are 80 at 24."""
    seen: list[tuple[int, int]] = []

    def run(rows: Tensor, length: int) -> Tensor:
        seen.append((len(rows), length))
        return rows[:, None, None].double().expand(-1, length, 1)

    states = by_length(masks([8, 24, 8, 16, 8, 24, 16, 8], 24), run, worth)
    assert seen == calls
    assert states[:, 0, 0].tolist() == list(range(8))


@pytest.mark.parametrize(
    "settings", [{}, {"fusion": "late", "text": {"cross_attention": (2, 3)}}], ids=["full", "late"]
)
def test_states_and_gradients_are_those_of_all_together(
    tiny_model: Callable[..., VisionLanguageModel], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_length, "__defaults__", (1,))
    model = tiny_model(**settings)
    torch.manual_seed(1)
    ids, mask = torch.randint(5, 60, (6, 24)), masks([24, 3, 9, 8, 20, 12], 24)

    def gradients(features: Tensor) -> list[Tensor]:
        weights = torch.linspace(-1, 1, features[mask].numel(), dtype=features.dtype).view_as(features[mask])
        found = torch.autograd.grad((features[mask] * weights).sum(), list(model.text.parameters()), allow_unused=True)
        return [g for g in found if g is not None]

    apart = model.encode_text(ids, mask)
    assert apart.states is not None
    together = model.text(model.text.embed(ids), mask, last=model._text_layers)
    torch.testing.assert_close(apart.states[mask], together[mask], rtol=0, atol=1e-10)
    for ours, expected in zip(gradients(apart.states), gradients(together), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
