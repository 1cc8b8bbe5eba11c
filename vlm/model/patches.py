"""Patches: which backbones have a token for each, how they are hidden, how an image is cut into them.

Letters: B images, P patches (rows by columns, row by row), K hidden ones of an image, S side of a patch in pixels, D width of the tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vlm.errors import ConfigError


def patch_side(backbone: Any, name: str) -> int:
    """S of a timm model that gives one token for each patch.

    Raises:
        ConfigError: it is none; says why it cannot hide patches.
    """
    embed = getattr(backbone, "patch_embed", None)
    if isinstance(backbone, VisionTransformer | Eva | Beit) and isinstance(embed, PatchEmbed):
        rows, columns = embed.patch_size
        if rows == columns:
            return int(rows)
        raise ConfigError(f"{name} has patches of {rows}x{columns} px; hiding patches needs square ones.")
    if embed is None:
        reason = "a convolutional network has no patch tokens to replace, and its features beside a hidden area have seen what is hidden"
    else:
        reason = "its tokens do not stand for a patch each from the first layer to the last: a stem of convolutions mixes them, or stages merge them"
    raise ConfigError(
        f"objectives.masked_image cannot hide patches of {name}: {reason}. Use a ViT, DeiT, BEiT or EVA (model.image.name=vit_base_patch16_224), or "
        "objectives.masked_image=0."
    )


@contextmanager
def hiding(backbone: Any, at: Tensor, token: Tensor) -> Iterator[None]:
    """Inside, the backbone sees `token` (D,) in place of the patches `at` (B, K), before positions are added, and drops none.

    After the patches' embedding (Xie et al. 2022, SimMIM), so that a hidden patch is known by its place alone.
    """

    def replace(module: Any, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        tokens = output.flatten(1, -2)  # where any image size is taken it is (B, h, w, D)
        hidden = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=at.device).scatter(1, at, True)
        return torch.where(hidden[..., None], token.to(tokens.dtype), tokens).view_as(output)

    handle = backbone.patch_embed.register_forward_hook(replace)
    dropping = getattr(backbone, "patch_drop", None)
    active = dropping is not None and dropping.training
    if dropping is not None:
        dropping.eval()
    try:
        yield
    finally:
        handle.remove()
        if dropping is not None:
            dropping.train(active)


def cut(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) to patches (B, P, S * S * 3), each row by row and pixel by pixel."""
    count, channels, height, width = images.shape
    grid = images.view(count, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, h, w, S, S, 3) -> (B, P, S * S * 3)


def pick(tokens: Tensor, at: Tensor) -> Tensor:
    """Rows `at` (B, K) of (B, P, N): (B, K, N)."""
    return tokens.gather(1, at[..., None].expand(-1, -1, tokens.shape[2]))
