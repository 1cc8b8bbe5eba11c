"""LoRA (Hu et al. 2022) through peft: adapters beside linear maps in training, plain weights in every checkpoint."""

from collections.abc import Collection

from torch import Tensor, nn

from vlm.config import LowRankConfig
from vlm.errors import ConfigError, UserError


def add_adapters(model: nn.Module, config: LowRankConfig, new: Collection[str]) -> frozenset[str]:
    """Puts adapters into `model`, in place, and freezes everything else but what is `new`; the names of all that is new now.

    They go to linear maps that would be trained: what is frozen gets none, and what nothing was loaded into is trained itself.

    Raises:
        UserError: peft is not installed. ConfigError: there is nothing to adapt.
    """
    if config.rank == 0:
        return frozenset(new)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            f"finetune.low_rank.rank={config.rank} needs peft, which is not installed; run: pip install 'vlm-fusion[lora]'."
        ) from None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if strangers := sorted(set(config.targets) - {_last_word(name) for name in linear} - set(LowRankConfig().targets)):
        raise ConfigError(
            f"finetune.low_rank.targets: no linear map is called {', '.join(strangers)}; "
            f"there are {', '.join(sorted({_last_word(name) for name in linear}))}."
        )
    targets = [
        name
        for name in linear
        if _last_word(name) in config.targets
        and model.get_submodule(name).weight.requires_grad
        and f"{name}.weight" not in new
    ]
    if not targets:
        raise ConfigError(
            f"finetune.low_rank.rank={config.rank}, but nothing is left to adapt: all of low_rank.targets is frozen, or new; "
            "set init_from, or thaw a part."
        )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and name in new}
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)  # type: ignore[arg-type]
    inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in trained)
    return frozenset(new) | {name for name, _ in model.named_parameters() if ".lora_" in name}


def _last_word(name: str) -> str:
    """text.layers.0.self_attention.query: query; fusion_memory.keys.3: keys."""
    return [part for part in name.split(".") if not part.isdigit()][-1]


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights with adapters merged into what they lie beside, under the names of a model without any; the model stays as it is."""
    state: dict[str, Tensor] = model.state_dict()
    plain = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):  # peft's layers; it is not imported where there are none
            for adapter in module.active_adapters:
                plain[f"{name}.weight"] = plain[f"{name}.weight"] + module.get_delta_weight(adapter).detach()
    return plain
