"""Settings of decoding: what no text can keep to or no score bears is refused, and what is taken keeps scores finite and exact."""

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlm.errors import ConfigError
from vlm.model.beam_search import beam_search, best_texts
from vlm.model.generation import Rules, exact_logits
from vlm.model.limits import LARGEST_DIVISOR, LARGEST_LENGTH_PENALTY, SMALLEST_DIVISOR
from vlm.model.sampling import Policy

Make = Callable[..., Any]
END = 3
PROMPTS = torch.tensor([[2, 8, 9], [2, 7, 12]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_length": 5, "max_length": 5}, "0 <= min_length < max_length"),
        ({"max_length": 0}, "^max_length=0: give at least 1"),
        ({"min_length": -1, "max_length": 0}, "^max_length=0: give at least 1"),
        *(
            ({"repetition_penalty": value}, f"repetition_penalty={value} must be above 0: give 1e-06 to 1e")
            for value in (0.0, -1.0, 1e-40, math.inf, math.nan)
        ),
        ({"no_repeat_ngram": -1}, "must not be negative"),
        ({"banned": ((5,), ())}, "a sequence without tokens"),
    ],
)
def test_wrong_rules_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rules(**{"end_id": END, "max_length": 9, **settings})


@pytest.mark.parametrize("length_penalty", [400, -400.0, math.inf, math.nan])
@pytest.mark.parametrize("beams", [1, 3])
def test_length_penalties_that_no_score_bears_are_refused(
    tiny_decoder: Make, length_penalty: float, beams: int
) -> None:
    model = tiny_decoder()
    with pytest.raises(ConfigError, match=f"length_penalty={length_penalty}: give -10 to 10"):
        beam_search(model, model.memory(2), PROMPTS, None, Rules(end_id=END, max_length=4), beams, length_penalty)


def test_a_whole_length_penalty_may_be_large_for_long_texts(tiny_model: Make) -> None:
    """90 to the power of 10 is more than 64 bits hold as a whole number."""
    model, ids = tiny_model(text={"max_positions": 96}), torch.tensor([[2], [7]])
    memory = model.memory(torch.randn(2, 5, model.image_encoder.dim, dtype=torch.float64), None, "decoder")
    rules = Rules(end_id=END, max_length=90, min_length=89)
    whole, fractional = (beam_search(model, memory, ids, None, rules, 2, penalty, True) for penalty in (10, 10.0))
    assert whole == fractional
    assert all(len(text.ids) >= 89 and text.key < 0 for text in whole)


@pytest.mark.parametrize("temperature", [1e-40, 1e-7, 1e7, 1e300])
def test_temperatures_that_fp32_scores_do_not_bear_are_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"temperature={temperature}: give 1e-06")):
        Policy(temperature=temperature)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_scores_bear_the_outermost_settings(kind: torch.dtype) -> None:
    """The coldest draw is the likeliest token, the hottest draws all that is allowed, and no penalty makes a score infinite."""
    scores = torch.tensor([[-3e3, 5.0, 5.001, -math.inf, 40.0]], dtype=kind)
    for temperature, expected in (
        (SMALLEST_DIVISOR, [1.0, 0, 0, 0, 0]),
        (LARGEST_DIVISOR, [0.25, 0.25, 0.25, 0.25, 0]),
    ):
        chances, tokens = Policy(temperature=temperature).chances(scores)
        torch.testing.assert_close(chances, torch.tensor([expected], dtype=kind), rtol=0, atol=1e-3)
        assert tokens.tolist() == [[4, 2, 1, 0, 3]]
    history = torch.arange(5)[None]
    for penalty in (SMALLEST_DIVISOR, LARGEST_DIVISOR):
        punished = Rules(end_id=END, max_length=9, repetition_penalty=penalty).apply(scores, history, 0)
        assert punished.isfinite().equal(scores.isfinite())
    for exponent in (-LARGEST_LENGTH_PENALTY, LARGEST_LENGTH_PENALTY):
        normed = torch.tensor([-3e3, -1e-3], dtype=kind) / 2048.0**exponent
        assert -math.inf < normed[0] < normed[1] < 0


@pytest.mark.parametrize(
    ("given", "compared"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_scores_have_at_least_single_precision(given: str, compared: str) -> None:
    """Else the log-probabilities of a model in bf16 would have three digits, and many beams the same score."""
    states = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(getattr(torch, given))
    logits = exact_logits(SimpleNamespace(language_logits=lambda states: states), states)  # type: ignore[arg-type]
    assert logits.dtype == getattr(torch, compared)
    assert torch.equal(logits.to(states.dtype), states)


@pytest.mark.parametrize(("beams", "count"), [(3, 4), (1, 2), (3, 0), (0, 1)])
def test_more_texts_than_beams_are_refused(tiny_decoder: Make, beams: int, count: int) -> None:
    model = tiny_decoder()
    with pytest.raises(ConfigError, match=f"beams={beams}"):
        best_texts(model, model.memory(2), PROMPTS, None, Rules(end_id=END, max_length=4), beams, count=count)
