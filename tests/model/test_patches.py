"""Patches: hidden ones are seen by no one, dropped ones cost nothing, and backbones without them say so."""

import pytest
import timm
import torch
from torch import Tensor

from vlm.config import ImageConfig
from vlm.errors import ConfigError
from vlm.model.image_encoder import ImageEncoder
from vlm.model.patches import cut, hiding, patch_side, pick

VITS = ("test_vit", "test_vit2", "eva02_tiny_patch14_224")  # any size; one size; rotary positions


def build(name: str = "test_vit", patches: int = 4, **settings: object) -> ImageEncoder:
    """An encoder of `patches` by `patches` patches, in evaluation mode."""
    torch.manual_seed(0)
    side = patches * (14 if name.startswith("eva") else 16)
    return ImageEncoder(ImageConfig(name=name, image_size=side, **settings)).eval()  # type: ignore[arg-type]


def pixels(encoder: ImageEncoder, count: int = 3) -> Tensor:
    size = encoder.image_size
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", VITS)
def test_nobody_sees_a_hidden_patch(name: str) -> None:
    encoder = build(name)
    side, images = encoder.patch, pixels(encoder)
    at, token = torch.tensor([[1, 6], [0, 15], [6, 9]]), torch.randn(encoder.dim)
    changed = images.clone()
    for row, numbers in enumerate(at.tolist()):
        for number in numbers:
            y, x = number // 4 * side, number % 4 * side
            changed[row, :, y : y + side, x : x + side] = 255 - changed[row, :, y : y + side, x : x + side]
    tokens = encoder.masked(images, at, token)
    assert tokens.shape == encoder(images).shape
    assert torch.equal(encoder.masked(changed, at, token), tokens)
    assert not torch.allclose(encoder(changed), encoder(images))
    seen = images.clone()
    seen[:, :, :side, side * 2 : side * 3] += 100  # patch 2 is hidden nowhere
    assert (encoder.masked(seen, at, token) != tokens).any(2).all()
    assert (encoder.masked(images, at, token.flip(0)) != tokens).any(2).all()
    assert torch.equal(encoder(images), encoder(images))  # and nothing stays hidden


def test_a_hidden_patch_keeps_its_position_only() -> None:
    encoder = build()
    torch.nn.init.normal_(encoder.backbone.pos_embed)
    token = torch.randn(encoder.dim)
    with hiding(encoder.backbone, torch.arange(16).expand(3, -1), token):
        embedded = encoder.backbone._pos_embed(encoder.backbone.patch_embed(encoder.normalize(pixels(encoder))))
    torch.testing.assert_close(
        embedded[:, 1:], (token + encoder.backbone.pos_embed[:, 1:]).expand(3, -1, -1), rtol=0, atol=0
    )


def test_an_image_is_cut_row_by_row() -> None:
    image = torch.arange(3 * 4 * 6.0).view(1, 3, 4, 6)
    patches = cut(image, 2)
    assert patches.shape == (1, 6, 12)
    for number in range(6):
        y, x = number // 3 * 2, number % 3 * 2
        expected = [image[0, c, y + i, x + j] for i in range(2) for j in range(2) for c in range(3)]
        assert patches[0, number].tolist() == expected
    assert torch.equal(pick(patches, torch.tensor([[4, 0]])), patches[:, [4, 0]])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test_resnet", "a convolutional network has no patch tokens"),
        ("test_convnext", "a convolutional network has no patch tokens"),
        ("swin_tiny_patch4_window7_224", "stages merge them"),
        ("vit_tiny_r_s16_p8_224", "a stem of convolutions mixes them"),
    ],
)
def test_what_cannot_hide_patches_says_why(name: str, reason: str) -> None:
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=0)
    with pytest.raises(ConfigError, match=f"cannot hide patches of {name}: .*{reason}.*Use a ViT"):
        patch_side(backbone, name)


@pytest.mark.parametrize(
    ("name", "share", "kept"),
    [("test_vit", 0.25, 12), ("test_vit", 0.7, 4), ("test_vit2", 0.99, 1), ("eva02_tiny_patch14_224", 0.5, 8)],
)
def test_a_share_of_the_patches_is_dropped_in_training_only(name: str, share: float, kept: int) -> None:
    encoder, whole = build(name, patch_drop=share), build(name)
    images = pixels(encoder)
    assert torch.equal(encoder(images), whole(images))
    assert encoder.train()(images).shape == (3, encoder.prefix + kept, encoder.dim)
    assert encoder.eval()(images).shape[1] == encoder.tokens()
    assert encoder.state_dict().keys() == whole.state_dict().keys()


@pytest.mark.parametrize("name", VITS[:2])
def test_what_is_left_are_the_tokens_of_the_full_image(name: str) -> None:
    """Exactly so where tokens do not read each other: attention is silenced. An image's own draw, and never the class token."""
    encoder = build(name, patch_drop=0.5)
    for block in encoder.backbone.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    images = pixels(encoder)
    every, left = encoder(images), encoder.train()(images)
    kept = []
    for full, few in zip(every, left, strict=True):
        same = (few[:, None] - full[None]).abs().amax(2) < 1e-5
        assert torch.equal(same.sum(1), torch.ones(9, dtype=torch.long))
        kept.append(same.float().argmax(1).tolist())
        assert kept[-1][0] == 0
        assert len(set(kept[-1])) == 9
    assert len({tuple(sorted(numbers)) for numbers in kept}) == 3
    encoder.pool(left)


def test_pooling_without_a_class_token_takes_what_is_left() -> None:
    encoder = build("test_vit3", patch_drop=0.5)
    assert encoder.backbone.cls_token is None
    left = encoder.train()(pixels(encoder))
    assert left.shape[1] == encoder.prefix + 8
    torch.testing.assert_close(encoder.pool(left), left[:, encoder.prefix :].mean(1))


@pytest.mark.parametrize("name", VITS)
def test_a_masked_view_is_not_dropped(name: str) -> None:
    encoder, whole = build(name, patch_drop=0.5).train(), build(name).train()
    images, at, token = pixels(encoder), torch.tensor([[0, 3], [1, 2], [5, 6]]), torch.zeros(encoder.dim)
    torch.testing.assert_close(encoder.masked(images, at, token), whole.masked(images, at, token))
    assert encoder(images).shape[1] == encoder.prefix + 8  # and dropping goes on


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224", "vit_relpos_small_patch16_224"])
def test_what_cannot_drop_patches_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"image\.patch_drop=0\.5: {name} cannot leave out patches"):
        ImageEncoder(ImageConfig(name=name, patch_drop=0.5))
