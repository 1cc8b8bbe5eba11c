"""ImageEncoder: token counts, equality with timm, sizes, freezing, weights files. timm's test_* models are a few thousand weights."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from vlm.config import ImageConfig
from vlm.errors import CheckpointError, ConfigError, UserError
from vlm.model.image_encoder import ImageEncoder

TRANSFORMERS = ("test_vit", "test_vit2")
CONVOLUTIONAL = ("test_resnet", "test_efficientnet", "test_convnext")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str, load: bool = True, **settings: object) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(ImageConfig(name=name, **settings), load)  # type: ignore[arg-type]


def pixels(size: int, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [64, 96, 160])
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("test_vit", lambda s: 1 + (s // 16) ** 2),
        ("test_resnet", lambda s: (s // 32) ** 2),
        ("test_efficientnet", lambda s: (s // 32) ** 2),
        ("test_convnext", lambda s: (s // 32) ** 2),
    ],
)
def test_token_count(name: str, count, size: int) -> None:
    encoder = build(name, image_size=size).eval()
    tokens = encoder(pixels(size))
    assert tokens.shape == (2, count(size), encoder.dim)
    assert encoder.tokens() == encoder.tokens(size) == count(size)
    assert encoder.image_size == size
    assert encoder.pool(tokens).shape == (2, encoder.dim)


def test_odd_sizes_round_as_the_network_does() -> None:
    for name, side in (("test_efficientnet", 3), ("test_resnet", 3), ("test_convnext", 2)):
        encoder = build(name, image_size=80).eval()
        assert encoder(pixels(80)).shape[1] == side**2 == encoder.tokens(80)


@pytest.mark.parametrize("name", TRANSFORMERS + CONVOLUTIONAL)
def test_equals_timm(name: str) -> None:
    encoder = build(name).eval()
    reference = timm.create_model(name, num_classes=0).eval()
    reference.load_state_dict(encoder.backbone.state_dict())
    images = pixels(encoder.image_size)
    data = timm.data.resolve_model_data_config(reference)
    mean, std = (torch.tensor(data[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    tokens = encoder(images)
    features = reference.forward_features((images / 255 - mean) / std)
    if name in CONVOLUTIONAL:
        if name == "test_convnext":
            features = reference.head.norm(features)
        features = features.flatten(2).transpose(1, 2)
        tokens = tokens - encoder.positions.flatten(2).transpose(1, 2)
    elif name == "test_vit2":
        features = reference.fc_norm(features)
    torch.testing.assert_close(tokens, features, rtol=1e-4, atol=1e-5)
    if name not in ("test_convnext", "test_vit2"):  # these norm after pooling
        pooled = reference((images / 255 - mean) / std)
        torch.testing.assert_close(encoder.pool(tokens), pooled, rtol=1e-4, atol=1e-5)


def test_float_images_are_taken_as_normalised() -> None:
    encoder = build("test_resnet", image_size=64).eval()
    images = pixels(64)
    normalised = (images.float() / 255 - encoder.mean) / encoder.std
    torch.testing.assert_close(encoder(images), encoder(normalised), rtol=0, atol=0)


def test_normalisation_equals_transformers_to_the_last_bit() -> None:
    from transformers import BlipImageProcessorPil

    encoder = build("test_vit").eval()
    mean = encoder.mean.flatten().tolist()
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16).contiguous()
    processor = BlipImageProcessorPil(do_resize=False, image_mean=mean, image_std=encoder.std.flatten().tolist())
    from PIL import Image

    expected = processor(Image.fromarray(values.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder.normalize(values[None]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [96, 224])
def test_vit_positions_are_resampled_as_timm_does(size: int, tmp_path: Path) -> None:
    native = timm.create_model("test_vit")
    torch.nn.init.normal_(native.pos_embed)
    file = tmp_path / "weights.safetensors"
    save_file(native.state_dict(), file)
    reference = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, img_size=size, num_classes=0
    )
    encoder = build("test_vit", weights=str(file), image_size=size)
    torch.testing.assert_close(encoder.backbone.pos_embed, reference.pos_embed, rtol=0, atol=0)
    assert encoder.backbone.pos_embed.requires_grad


def test_vit_file_of_another_size_is_resampled_once(tmp_path: Path) -> None:
    larger = timm.create_model("test_vit", img_size=192)
    torch.nn.init.normal_(larger.pos_embed)
    file = tmp_path / "weights.safetensors"
    save_file(larger.state_dict(), file)
    encoder = build("test_vit", weights=str(file), image_size=192)
    torch.testing.assert_close(encoder.backbone.pos_embed, larger.pos_embed, rtol=0, atol=0)
    assert build("test_vit", weights=str(file)).image_size == 160  # timm's size where none is asked for


def test_learned_positions_are_interpolated() -> None:
    encoder = build("test_resnet", image_size=96).eval()
    ramp = torch.linspace(0, 1, 3).view(1, 1, 1, 3).expand(1, encoder.dim, 3, 3)
    encoder.positions.data.copy_(ramp)
    images = pixels(160)
    before = encoder(images)
    positions = before - encoder.backbone(encoder.normalize(images)).flatten(2).transpose(1, 2)
    row = positions[0, :5, 0]
    assert (row.diff() > 0).all()  # still a ramp, over 5 columns now
    torch.testing.assert_close(positions[0, 5:10, 0], row)
    assert encoder.resize(160).image_size == 160
    assert encoder.positions.shape[2:] == (5, 5)
    torch.testing.assert_close(encoder(images), before)  # the same interpolation, made permanent


def test_a_vit_refuses_images_of_another_size() -> None:
    encoder = build("test_vit", image_size=64)
    with pytest.raises(ValueError, match=r"96x96.*built for 64x64.*resize\(96\)"):
        encoder(pixels(96))
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        encoder(torch.zeros(1, 1, 64, 64))


@pytest.mark.parametrize("name", CONVOLUTIONAL[:2])
def test_frozen_batch_norm_keeps_its_statistics(name: str) -> None:
    def statistics(encoder: ImageEncoder) -> list[Tensor]:
        return [b.clone() for k, b in encoder.backbone.named_buffers() if "running" in k]

    for mode, changes in (("frozen", False), ("local", True)):
        encoder = build(name, image_size=64, batch_norm=mode).train()
        before = statistics(encoder)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
        encoder(pixels(64)).square().mean().backward()
        optimizer.step()
        after = statistics(encoder)
        assert before
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) == changes


def test_batch_norm_is_frozen_where_weights_are_given(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), file)
    assert build("test_resnet").batch_norm == "local"
    given = build("test_resnet", weights=str(file))
    assert given.batch_norm == "frozen"
    norms = [m for m in given.train().modules() if isinstance(m, _BatchNorm)]
    assert norms
    assert not any(m.training for m in norms)
    assert build("test_resnet", load=False, weights="not/there.pth").batch_norm == "frozen"  # a checkpoint follows


@pytest.mark.parametrize("name", ["test_vit", *CONVOLUTIONAL])
def test_frozen_and_trainable_blocks(name: str) -> None:
    def trained(**settings: object) -> tuple[set[str], ImageEncoder]:
        encoder = build(name, image_size=64, **settings).train()
        tokens = encoder(pixels(64))
        if tokens.requires_grad:
            tokens.sum().backward()
        return {k for k, p in encoder.backbone.named_parameters() if p.grad is not None}, encoder

    every = {k for k, _ in build(name).backbone.named_parameters()}
    assert trained()[0] == every
    frozen, encoder = trained(frozen=True)
    assert not frozen
    assert not any(m.training for m in encoder.backbone.modules() if list(m.parameters()))
    last, encoder = trained(trainable_blocks=1)
    more, _ = trained(trainable_blocks=2)
    assert set() < last < more < every
    assert any(p.ndim > 1 for k, p in encoder.backbone.named_parameters() if k in last)  # a block, not a norm alone
    with pytest.raises(ConfigError, match="trainable_blocks=99"):
        build(name, trainable_blocks=99)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_checkpointing_changes_nothing(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = build(name, image_size=64, checkpointing=checkpointing, batch_norm="frozen").train()
        encoder(pixels(64)).square().mean().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_grouped_convolutions_train_in_float32_under_autocast() -> None:
    encoder = build("test_efficientnet", image_size=64, batch_norm="frozen").train()
    images = pixels(64)
    exact = encoder(images)
    exact.square().mean().backward()
    expected = {k: p.grad for k, p in encoder.named_parameters()}
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(images)
    tokens.float().square().mean().backward()
    torch.testing.assert_close(tokens.float(), exact, rtol=0.1, atol=0.1)
    for k, p in encoder.named_parameters():
        cosine = torch.cosine_similarity(p.grad.flatten(), expected[k].flatten(), dim=0)
        assert cosine > 0.95, k


def test_weights_in_another_implementations_names(tmp_path: Path) -> None:
    source = timm.create_model("test_efficientnet")
    for norm in (m for m in source.modules() if isinstance(m, _BatchNorm)):
        torch.nn.init.normal_(norm.running_mean)
    file = tmp_path / "weights.pth"
    torch.save({f"layer{i}.w": t for i, t in enumerate(source.state_dict().values())}, file)
    encoder = build("test_efficientnet", weights=str(file))
    expected = source.state_dict()
    for name, tensor in encoder.backbone.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_weights_wrapped_and_with_another_classifier(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet", num_classes=3)
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{k}": t for k, t in source.state_dict().items()}, "epoch": 3}, file)
    encoder = build("test_resnet", weights=str(file))
    torch.testing.assert_close(encoder.backbone.conv1.state_dict(), source.conv1.state_dict(), rtol=0, atol=0)


def test_unfit_weights_name_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    with pytest.raises(
        CheckpointError, match=r"does not fit test_resnet.*missing: '.*unexpected: 'blocks.*image\.name"
    ):
        build("test_resnet", weights=str(file))
    state = timm.create_model("test_resnet").state_dict()
    first = next(iter(state))
    state[first] = state[first][:1].clone()
    save_file(state, file)
    with pytest.raises(CheckpointError, match=rf"{first} has shape \(1, .*expects"):
        build("test_resnet", weights=str(file))


def test_unreadable_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such weights file"):
        build("test_resnet", weights=str(tmp_path / "none.pth"))
    file = tmp_path / "bad.safetensors"
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        build("test_resnet", weights=str(file))
    pickle = tmp_path / "bad.pth"
    torch.save({"a": Path("x")}, pickle)  # an arbitrary object: would run code when unpickled
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        build("test_resnet", weights=str(pickle))
    torch.save([1, 2], pickle)
    with pytest.raises(CheckpointError, match="holds a list"):
        build("test_resnet", weights=str(pickle))


def test_unknown_names_and_settings() -> None:
    with pytest.raises(ConfigError, match=r"nearest are .*resnet50"):
        build("resnet5O")
    with pytest.raises(ConfigError, match=r"drop_path=0\.1"):
        build("vgg11", drop_path=0.1)


def test_unreachable_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("vlm.model.backbone.timm.create_model", refuse)
    with pytest.raises(UserError, match=r"could not be fetched \(OSError: no network\).*image\.weights"):
        build("test_resnet", pretrained=True)


def test_a_copy_and_a_checkpoint_keep_everything() -> None:
    encoder = build("test_efficientnet", image_size=96).eval()
    encoder.mean.fill_(0.25)
    images = pixels(96)
    other = ImageEncoder(encoder.config, load=False).eval()
    other.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(other(images), encoder(images), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(encoder)(images), encoder(images), rtol=0, atol=0)


def test_builds_without_memory() -> None:
    with torch.device("meta"):
        for name in ("test_vit", "test_resnet"):
            assert build(name, image_size=96).tokens() in (37, 9)


def test_stages_keep_the_feature_map_of_that_index() -> None:
    whole = timm.create_model("resnet10t", num_classes=0).eval()
    encoder = ImageEncoder(ImageConfig(name="resnet10t", image_size=64, stages=2)).eval()
    encoder.backbone.load_state_dict(whole.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = whole.forward_intermediates(images, indices=[2], intermediates_only=True)[0]
        tokens = encoder(images) - encoder.positions.flatten(2).transpose(1, 2)
    assert encoder.dim == 128
    assert encoder.tokens() == 64
    torch.testing.assert_close(tokens, expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_stages_beyond_the_last_are_refused() -> None:
    with pytest.raises(ConfigError, match="stages=9"):
        ImageEncoder(ImageConfig(name="resnet10t", image_size=64, stages=9))


def test_width_brings_the_feature_map_to_another_width_and_is_trained_beside_a_frozen_backbone() -> None:
    torch.manual_seed(0)
    plain = ImageEncoder(ImageConfig(name="resnet10t", image_size=64, frozen=True)).eval()
    encoder = ImageEncoder(ImageConfig(name="resnet10t", image_size=64, frozen=True, width=24)).eval()
    encoder.backbone.load_state_dict(plain.backbone.state_dict())
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = encoder(images)
    linear, norm = encoder.projection
    wide = plain(images) - plain.positions.flatten(2).transpose(1, 2)
    expected = F.layer_norm(linear(wide), (24,)) + encoder.positions.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected)
    assert encoder.dim == encoder.pool(tokens).shape[1] == 24
    tokens.square().sum().backward()
    assert linear.weight.grad is not None
    assert norm.weight.grad is not None


def test_width_is_refused_where_there_is_no_feature_map() -> None:
    with pytest.raises(ConfigError, match=r"image\.width=24.*test_vit"):
        ImageEncoder(ImageConfig(name="test_vit", width=24))


def test_bf16_training_on_a_cpu_takes_plain_attention_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA's backward is slow there; everything else keeps SDPA."""
    calls: list[int] = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or sdpa(*a, **k))
    encoder, images = build("test_vit", checkpointing=True), pixels(160)
    exact = encoder(images)
    assert calls
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(images)
    tokens.sum().backward()  # recomputes
    assert not calls
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fused = encoder(images)
    assert calls
    near = (tokens - exact).norm() / exact.norm(), (fused - exact).norm() / exact.norm()
    assert max(near) < 2e-2
    assert near[0] < 2 * near[1]
