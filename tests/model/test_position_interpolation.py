"""Positions of a ViT at another image size, against the two published ways.

By default ours is timm's: bicubic with antialiasing, whose kernel (Keys 1981, a = -0.5) is another one than that of plain bicubic interpolation
(a = -0.75), also where the grid grows. transformers' BLIP, as the authors' code, does the latter, and what is converted goes on so.
"""

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from transformers import BlipVisionConfig, BlipVisionModel

from vlm.config import ImageConfig
from vlm.model.convert.blip import VISION, VISION_LAYER, VISION_PARAMETERS
from vlm.model.image_encoder import ImageEncoder

# As ALBEF and BLIP fine-tune: from 224 or 256 px to 384 or 480 px, and back.
SIZES = pytest.mark.parametrize(("before", "after"), [(224, 384), (256, 384), (224, 480), (384, 224)])


def encoder(size: int, antialias: bool = True) -> ImageEncoder:
    torch.manual_seed(0)
    built = ImageEncoder(ImageConfig(name="test_vit", image_size=size, norm_eps=1e-5, antialias=antialias)).eval()
    torch.nn.init.normal_(built.backbone.pos_embed)
    torch.nn.init.normal_(built.backbone.cls_token)
    return built


def in_transformers(ours: ImageEncoder, size: int) -> BlipVisionModel:
    """The same weights there, but for the positions where `size` is not ours."""
    model = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=2, image_size=size
        )
    ).eval()
    modules = dict(VISION)
    for n in range(6):
        modules |= {f"encoder.layers.{n}.{there}": f"blocks.{n}.{here}" for there, here in VISION_LAYER.items()}
    names = {f"{there}.{kind}": f"{here}.{kind}" for there, here in modules.items() for kind in ("weight", "bias")}
    state = ours.backbone.state_dict()
    model.load_state_dict({there: state[here] for there, here in (names | VISION_PARAMETERS).items()})
    return model


@SIZES
def test_resizing_equals_timm(before: int, after: int) -> None:
    ours = encoder(before)
    positions = ours.backbone.pos_embed.detach().clone()
    expected = resample_abs_pos_embed(positions, new_size=[after // 16, after // 16], num_prefix_tokens=1)
    ours.resize(after)
    torch.testing.assert_close(ours.backbone.pos_embed.detach(), expected, rtol=0, atol=0)
    torch.testing.assert_close(ours.backbone.pos_embed[:, 0], positions[:, 0], rtol=0, atol=0)


@SIZES
def test_without_antialiasing_the_features_are_transformers(before: int, after: int) -> None:
    ours, timms = encoder(before, antialias=False), encoder(before)
    theirs = in_transformers(ours, before)
    images = torch.randn(1, 3, after, after)
    ours.resize(after)
    timms.resize(after)
    assert ours.backbone.pos_embed.requires_grad
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)
        assert (timms(images) - expected).abs().max() > 1e-3  # two ways, not one
