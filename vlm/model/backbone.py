"""timm models without their classifiers, as the settings want them, with errors that say which setting does not suit."""

import difflib
from typing import Any

import timm
import torch
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
from timm.models import group_parameters
from torch import nn

from vlm.config import ImageConfig
from vlm.errors import ConfigError, UserError


def create_backbone(config: ImageConfig, download: bool) -> Any:
    """The timm model without its classifier; ConfigError names the nearest known model."""
    given = {"drop_path": config.drop_path, "patch_drop": config.patch_drop}
    options = {f"{name}_rate": rate for name, rate in given.items() if rate}
    if not config.name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        hint = f"the nearest are {', '.join(near)}" if near else "timm.list_models() lists all"
        raise ConfigError(f"image.name: timm {timm.__version__} has no model {config.name!r}; {hint}.")
    try:
        backbone: Any = timm.create_model(config.name, pretrained=download, num_classes=0, **options)
    except TypeError as error:
        if "patch_drop_rate" in str(error):
            raise _no_patch_drop(config) from error
        raise ConfigError(
            f"image.drop_path={config.drop_path}: {config.name} does not take it ({error}); use 0."
        ) from error
    except Exception as error:
        if not download:
            raise ConfigError(f"image.name={config.name!r}: timm cannot build it: {error}") from error
        raise UserError(
            f"The pretrained weights of {config.name} could not be fetched ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "give image.weights a local file, or set image.pretrained to false."
        ) from error
    # Some of timm's models swallow settings that they do not know.
    if config.patch_drop and not isinstance(
        getattr(backbone, "patch_drop", None), PatchDropout | PatchDropoutWithIndices
    ):
        raise _no_patch_drop(config)
    return backbone


def _no_patch_drop(config: ImageConfig) -> ConfigError:
    return ConfigError(
        f"image.patch_drop={config.patch_drop}: {config.name} cannot leave out patches, as its later layers need the whole grid of them, or as timm "
        "does not offer it; use 0, or a plain ViT (vit_*, deit_*, eva02_*)."
    )


def keep_stages(backbone: Any, config: ImageConfig) -> None:
    """Cuts what follows the feature map of index `stages`."""
    try:
        backbone.prune_intermediate_layers([config.stages], prune_norm=True, prune_head=True)
    except (AssertionError, AttributeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"image.stages={config.stages} does not suit {config.name}: {error}; use a smaller index, or null."
        ) from error


def blocks_of(backbone: Any) -> list[list[str]]:
    """Names of the parameters of the stem and then of each block (stage of a convolutional network), with the norm or projection that follows it."""
    groups = list(group_parameters(backbone, backbone.group_matcher(coarse=True)).values())
    shapes = {name: p.ndim for name, p in backbone.named_parameters()}
    if all(shapes[name] == 1 for name in groups[-1]):  # a norm alone (ConvNeXt) is no block
        groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def set_norm_eps(backbone: nn.Module, eps: float) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def choose_attention(backbone: Any) -> None:
    """Lets timm's attention layers take three plain operations in bf16 training on a CPU, SDPA everywhere else: see `vlm.model.attention`.

    Not undone after the forward pass, because layers that recompute their activations in the backward pass must take the same way again.
    """
    device = next(backbone.parameters()).device.type
    bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    plain = device == "cpu" and bf16 and torch.is_grad_enabled()
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            fused = module.__dict__.setdefault("fused_by_default", module.fused_attn)
            module.fused_attn = fused and not plain
