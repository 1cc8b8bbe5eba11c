"""AdamW's parameter groups and the rate's schedule."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vlm.config import OptimizerConfig
from vlm.errors import ConfigError

UNDECAYED = ("position", "pos_embed", "cls_token", "reg_token", "dist_token")


def named_parameters(model: nn.Module, beside: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """The model's parameters by name, and those `beside` it (of objectives)."""
    return dict(model.named_parameters()) | ({} if beside is None else dict(beside.named_parameters()))


def parameter_groups(
    model: nn.Module,
    config: OptimizerConfig,
    beside: nn.Module | None = None,
    factors: Mapping[str, float] = MappingProxyType({}),
) -> list[dict[str, object]]:
    """Groups by rate factor and decay. Biases, norms, positions and the temperature never decay. beside: see `named_parameters`.

    factors: by parameter, multiplied with those of the settings' `lr_factors`.

    Raises:
        ConfigError: `lr_factors` names a part that is not there.
    """
    everything = named_parameters(model, beside)
    named = [(name, p) for name, p in everything.items() if p.requires_grad]
    for prefix in config.lr_factors:
        if not any(_within(name, prefix) for name in everything):
            parts = sorted({name.split(".")[0] for name in everything})
            raise ConfigError(f"optimizer.lr_factors: no part is called {prefix!r}; there are {', '.join(parts)}.")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        matching = [prefix for prefix in config.lr_factors if _within(name, prefix)]
        factor = (config.lr_factors[max(matching, key=len)] if matching else 1.0) * factors.get(name, 1.0)
        groups.setdefault((factor, decays(name, parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "factor": factor,
            "lr": config.lr * factor,
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for (factor, decay), parameters in groups.items()
    ]


def _within(name: str, part: str) -> bool:
    """Whether the parameter belongs to that part of the model: whole names only, so that `text` is not `text_projection`."""
    return name == part or name.startswith(part + ".")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, but not to positions and learned tokens (timm's `pos_embed`, `cls_token`, ...)."""
    return parameter.ndim > 1 and not any(part in name for part in UNDECAYED)


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    beside: nn.Module | None = None,
    factors: Mapping[str, float] = MappingProxyType({}),
) -> torch.optim.AdamW:
    """Fused where the device has it. factors: see `parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model, config, beside, factors), lr=config.lr, betas=config.betas, fused=True
    )


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, beside: nn.Module | None = None
) -> dict[str, dict[str, Any]]:
    """What the optimizer remembers of each parameter, by the parameter's name: it does not depend on groups or their order."""
    names = _names(named_parameters(model, beside), optimizer)
    return {names[index]: state for index, state in optimizer.state_dict()["state"].items()}


def load_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, dict[str, Any]],
    beside: nn.Module | None = None,
) -> None:
    """Takes back what `optimizer_state` gave; rates and decay stay those of the present settings.

    Raises:
        ValueError: it is of other parameters.
    """
    names = _names(named_parameters(model, beside), optimizer)
    if strangers := sorted(set(state) - set(names)):
        raise ValueError(f"the optimizer's state is of other parameters, {len(strangers)} such as {strangers[0]}")
    # What the task never used has none.
    numbered = {index: state[name] for index, name in enumerate(names) if name in state}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def _names(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters' names in the order in which the optimizer numbers them."""
    known = {id(parameter): name for name, parameter in named.items()}
    return [known[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def schedule(config: OptimizerConfig, total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The rate's factor at each step, from 0: linear warm-up, then cosine, linear, step (a factor an epoch) or constant, down to `min_lr_factor`.

    Raises:
        ConfigError: the warm-up would go down.
    """
    low, start = config.min_lr_factor, config.warmup_from / config.lr
    warmup = min(config.warmup_steps, max(1, total_steps // 2))
    if warmup and not 0 <= start <= 1:
        raise ConfigError(
            f"optimizer.warmup_from={config.warmup_from:g} is not between 0 and optimizer.lr={config.lr:g}; set it to 0."
        )

    def factor(step: int) -> float:
        if step < warmup:
            return start + (1 - start) * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if config.schedule == "cosine":
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
        if config.schedule == "linear":
            return low + (1 - low) * (1 - progress)
        if config.schedule == "step":
            return max(low, config.step_factor ** (step // max(1, steps_per_epoch)))
        return 1.0

    return factor
