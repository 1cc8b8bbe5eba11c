"""Which parameters decay, at which rate each is trained, and the rate's course at points computed by hand."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vlm.config import ModelConfig, OptimizerConfig
from vlm.errors import ConfigError
from vlm.model.vision_language import VisionLanguageModel
from vlm.train.optimizer import (
    build_optimizer,
    decays,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    schedule,
)


def settings_by_name(model: nn.Module, config: OptimizerConfig) -> dict[str, tuple[Any, Any]]:
    """(rate factor, decay) that each parameter came under."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[Any, Any]] = {}
    for group in parameter_groups(model, config):
        parameters = group["params"]
        assert isinstance(parameters, list)
        for parameter in parameters:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["factor"], group["weight_decay"])
    return found


def test_biases_norms_positions_and_the_temperature_do_not_decay(tiny_config: Callable[..., ModelConfig]) -> None:
    model = VisionLanguageModel(tiny_config())
    found = settings_by_name(model, OptimizerConfig(weight_decay=0.3))
    assert set(found) == {name for name, _ in model.named_parameters()}
    undecayed = {name for name, (_, decay) in found.items() if decay == 0}
    assert {found[name][1] for name in set(found) - undecayed} == {0.3}
    for name in found:
        plain = name.endswith("bias") or "norm" in name or "position" in name or name == "temperature"
        plain = plain or "pos_embed" in name or "cls_token" in name or "reg_token" in name or name.endswith("gamma")
        assert (name in undecayed) == plain, name
    assert {"temperature", "text.embeddings.position.weight", "image_encoder.backbone.pos_embed"} <= undecayed
    assert "text.embeddings.word.weight" not in undecayed


@pytest.mark.parametrize(
    ("name", "shape", "want"),
    [
        ("layers.0.query.weight", (4, 4), True),
        ("conv.weight", (4, 3, 3, 3), True),
        ("layers.0.query.bias", (4,), False),
        ("bn1.weight", (4,), False),
        ("temperature", (), False),
        ("image_encoder.positions", (1, 4, 2, 2), False),
        ("backbone.pos_embed", (1, 5, 4), False),
        ("backbone.cls_token", (1, 1, 4), False),
        ("backbone.reg_token", (1, 4, 4), False),
        ("relative_position_bias_table", (9, 2), False),
    ],
)
def test_what_decays(name: str, shape: tuple[int, ...], want: bool) -> None:
    assert decays(name, nn.Parameter(torch.zeros(shape))) is want


def test_the_longest_name_sets_the_rate_and_what_is_not_trained_is_left_out() -> None:
    model = nn.ModuleDict(
        {
            "image_encoder": nn.ModuleDict({"stem": nn.Linear(2, 2), "blocks": nn.Linear(2, 2)}),
            "text": nn.Linear(2, 2),
            "text_projection": nn.Linear(2, 2, bias=False),
        }
    )
    model["text"].bias.requires_grad_(False)
    config = OptimizerConfig(
        lr=1.0, lr_factors={"image_encoder": 0.1, "image_encoder.blocks": 0.5, "text": 0.25}, weight_decay=0.3
    )
    assert settings_by_name(model, config) == {
        "image_encoder.stem.weight": (0.1, 0.3),
        "image_encoder.stem.bias": (0.1, 0.0),
        "image_encoder.blocks.weight": (0.5, 0.3),
        "image_encoder.blocks.bias": (0.5, 0.0),
        "text.weight": (0.25, 0.3),
        "text_projection.weight": (1.0, 0.3),
    }
    rates = {group["factor"]: group["lr"] for group in build_optimizer(model, config).param_groups}
    assert rates == {0.1: 0.1, 0.25: 0.25, 0.5: 0.5, 1.0: 1.0}


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.5, 0.6)])
def test_the_moments_are_of_the_settings(betas: tuple[float, float]) -> None:
    """After one step they are 1 - beta of the gradient and of its square."""
    model = nn.Linear(3, 1)
    optimizer = build_optimizer(model, OptimizerConfig(betas=betas))
    model(torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    optimizer.step()
    moments = optimizer.state[model.weight]
    torch.testing.assert_close(moments["exp_avg"], (1 - betas[0]) * torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(moments["exp_avg_sq"], (1 - betas[1]) * torch.tensor([[1.0, 4.0, 9.0]]))


def test_an_unknown_part_names_the_parts() -> None:
    model = nn.ModuleDict({"image_encoder": nn.Linear(2, 2), "text": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match=r"lr_factors: no part is called 'vision'; .* image_encoder, text") as caught:
        parameter_groups(model, OptimizerConfig(lr_factors={"vision": 0.1}))
    assert caught.value.exit_code == 2


def test_a_frozen_part_may_have_a_factor() -> None:
    model = nn.ModuleDict({"image_encoder": nn.Linear(2, 2).requires_grad_(False), "text": nn.Linear(2, 2)})
    assert len(parameter_groups(model, OptimizerConfig(lr_factors={"image_encoder": 0.1}))) == 2


def stepped(config: OptimizerConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of two parts after two steps."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"image": nn.Linear(3, 3), "text": nn.Linear(3, 3)})
    optimizer = build_optimizer(model, config)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model["text"](model["image"](torch.ones(2, 3))).square().sum().backward()
    optimizer.step()


def test_the_state_goes_by_parameter_names_and_survives_other_groups() -> None:
    config = OptimizerConfig(lr=0.1, weight_decay=0.0)
    model, optimizer = stepped(config)
    state = copy.deepcopy(optimizer_state(model, optimizer))
    assert set(state) == {"image.weight", "image.bias", "text.weight", "text.bias"}
    weights = copy.deepcopy(model.state_dict())
    step(model, optimizer)
    # the same parameters in another order and in more groups, which do nothing different at factor 1
    again, _ = stepped(config)
    again.load_state_dict(weights)
    regrouped = build_optimizer(again, OptimizerConfig(lr=0.1, weight_decay=0.0, lr_factors={"text": 1.0}))
    regrouped.param_groups.reverse()
    load_optimizer_state(again, regrouped, state)
    step(again, regrouped)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_present_rates_count_not_the_saved_ones() -> None:
    model, optimizer = stepped(OptimizerConfig(lr=0.1, lr_factors={"image": 0.5}))
    state = optimizer_state(model, optimizer)
    other = build_optimizer(model, OptimizerConfig(lr=0.2, lr_factors={"image": 0.25}))
    load_optimizer_state(model, other, state)
    assert sorted({group["factor"] for group in other.param_groups}) == [0.25, 1.0]
    assert {group["lr"] for group in other.param_groups} == {0.05, 0.2}


def test_a_state_of_other_parameters_is_refused() -> None:
    model, optimizer = stepped(OptimizerConfig())
    state = optimizer_state(model, optimizer)
    state["stranger"] = state.pop("text.bias")
    with pytest.raises(ValueError, match=r"of other parameters, 1 such as stranger"):
        load_optimizer_state(model, optimizer, state)
    del state["stranger"]
    load_optimizer_state(model, optimizer, state)  # a part that was never used has no state
    assert set(optimizer_state(model, optimizer)) == {"image.weight", "image.bias", "text.weight"}


COSINE = [
    *[(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0)],
    # 4 of 16 steps after the warm-up: a quarter of the way
    *[(8, 0.2 + 0.8 * 0.5 * (1 + math.sqrt(0.5))), (12, 0.6), (20, 0.2), (50, 0.2)],
]
LINEAR = [(0, 0.25), (3, 1.0), (4, 1.0), (8, 0.8), (12, 0.6), (19, 0.25), (20, 0.2), (50, 0.2)]
STEP = [(0, 0.25), (3, 1.0), (4, 1.0), (5, 0.5), (9, 0.5), (10, 0.25), (15, 0.2), (19, 0.2)]
CONSTANT = [(0, 0.25), (3, 1.0), (4, 1.0), (19, 1.0)]


@pytest.mark.parametrize(
    ("shape", "want"), [("cosine", COSINE), ("linear", LINEAR), ("step", STEP), ("constant", CONSTANT)]
)
def test_schedules_at_points_computed_by_hand(shape: Any, want: list[tuple[int, float]]) -> None:
    config = OptimizerConfig(schedule=shape, warmup_steps=4, min_lr_factor=0.2, step_factor=0.5)
    factor = schedule(config, total_steps=20, steps_per_epoch=5)
    assert [(step, pytest.approx(value)) for step, value in want] == [(step, factor(step)) for step, _ in want]


def test_a_run_shorter_than_the_warm_up_reaches_the_peak_and_falls_again() -> None:
    factor = schedule(OptimizerConfig(warmup_steps=100, schedule="linear", min_lr_factor=0.0), 10, 10)
    assert [factor(step) for step in range(10)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert schedule(OptimizerConfig(warmup_steps=0), 10, 10)(0) == 1.0
    assert schedule(OptimizerConfig(warmup_steps=100), 1, 1)(0) == 1.0


def test_the_warm_up_begins_at_the_rate_that_is_said() -> None:
    """ALBEF's question answering: from 1e-5 to 2e-5 in equal steps; what comes after is as without."""
    config = OptimizerConfig(lr=2.0e-5, warmup_steps=4, warmup_from=1.0e-5, schedule="linear", min_lr_factor=0.0)
    factor = schedule(config, 20, 5)
    assert [config.lr * factor(step) for step in range(4)] == pytest.approx([1.25e-5, 1.5e-5, 1.75e-5, 2.0e-5])
    plain = schedule(OptimizerConfig(lr=2.0e-5, warmup_steps=4, schedule="linear", min_lr_factor=0.0), 20, 5)
    assert [factor(step) for step in range(4, 21)] == [plain(step) for step in range(4, 21)]
    assert schedule(OptimizerConfig(lr=1e-5, warmup_from=1e-4, warmup_steps=0), 20, 5)(0) == 1.0


@pytest.mark.parametrize("start", [2.0e-5, -1.0e-6])
def test_a_warm_up_that_would_go_down_is_refused(start: float) -> None:
    with pytest.raises(ConfigError, match=r"warmup_from=.* is not between 0 and optimizer\.lr=1e-05; set it to 0"):
        schedule(OptimizerConfig(lr=1.0e-5, warmup_from=start, warmup_steps=4), 20, 5)
