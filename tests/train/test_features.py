"""Features of a frozen image encoder kept on disk: what is learned is what is learned from the images, and nothing is made twice."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import vlm.features
from vlm.build import build_parts, load_sets, training_loader
from vlm.config import Config
from vlm.data.encoders import training_transform
from vlm.data.features import StoredFeatures
from vlm.data.loader import Loader
from vlm.data.shards import ShardWriter
from vlm.errors import ConfigError, UserError
from vlm.features import stored_features
from vlm.run import train
from vlm.train.distributed import Ranks
from vlm.train.report import read_json_lines

MakeConfig = Callable[..., Config]
ALONE = Ranks(0, 1, torch.device("cpu"))
FROZEN: dict[str, Any] = {"data.splits.val": [], "train.epochs": 3, "data.views": 2}
ENCODERS: dict[str, dict[str, Any]] = {
    "feature map": {"name": "resnet10t", "image_size": 32, "stages": 2, "frozen": True},
    "of another width": {"name": "resnet10t", "image_size": 32, "stages": 2, "width": 24, "trainable_blocks": 0},
    "ViT": {"name": "test_vit", "image_size": 32, "frozen": True},
}


def losses(config: Config) -> list[float]:
    train(config)
    lines = read_json_lines(Path(config.out) / "log.jsonl")
    return [line["loss"] for line in lines if line["kind"] == "train"]


def features_of(config: Config, ranks: Ranks = ALONE) -> StoredFeatures:
    sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache)
    encoder = build_parts(config, sets).model.image_encoder
    found = stored_features(config, encoder, training_transform(config.data, encoder.image_size), sets, ranks)
    assert found is not None
    return found


def loader_of(config: Config) -> Loader:
    sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache)
    return training_loader(config, build_parts(config, sets), sets, ALONE)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_run_from_features_is_that_from_images(make_config: MakeConfig, tmp_path: Path, encoder: str) -> None:
    """But for their rounding to half precision; with a loader process or without."""
    settings = {**FROZEN, "model.image": ENCODERS[encoder], "task": "pretraining", "objectives.masked_language": 1.0}
    exact = losses(make_config({**settings, "out": str(tmp_path / "images")}))
    kept = {**settings, "data.features": str(tmp_path / "features")}
    found = losses(make_config({**kept, "out": str(tmp_path / "stored")}))
    assert len(found) == 18
    assert found == pytest.approx(exact, rel=2e-3)
    assert losses(make_config({**kept, "out": str(tmp_path / "again"), "data.workers": 1})) == found


def test_what_is_there_is_not_made_again(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a file that is missing or cut off; and the steps decode nothing."""
    config = make_config({**FROZEN, "model.image": ENCODERS["feature map"], "data.features": str(tmp_path / "kept")})
    files = sorted(features_of(config).files)
    assert len(files) == 3
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:100])
    features_of(config)
    now = [file.stat().st_mtime_ns for file in files]
    assert now[0] == times[0]
    assert now[1] > times[1]
    assert files[2].stat().st_size > 100

    def refuse(*_: Any) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("vlm.data.samples.decode_pixels", refuse)
    monkeypatch.setattr(vlm.features, "decode_pixels", refuse)
    assert next(loader_of(config).iterate(0)).images.dtype == torch.float16


def test_other_weights_and_other_augmentations_have_files_of_their_own(make_config: MakeConfig, tmp_path: Path) -> None:
    settings = {**FROZEN, "model.image": ENCODERS["feature map"], "data.features": str(tmp_path / "kept")}
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"data.crop_scale": [0.9, 1.0]}, {"data.views": 3}]
    folders = {features_of(make_config({**settings, **change})).files[0].parent for change in changes}
    assert len(folders) == 4


def test_weights_that_differ_in_the_sign_of_0_alone_share_files(make_config: MakeConfig, tmp_path: Path) -> None:
    """Averaging makes 0 of -0: a run that goes on from averaged weights must find what the first one made."""
    config = make_config({**FROZEN, "model.image": ENCODERS["feature map"], "data.features": str(tmp_path / "kept")})
    sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache)
    encoder = build_parts(config, sets).model.image_encoder
    weight = next(encoder.backbone.parameters())
    prints = set()
    for zero in (0.0, -0.0):
        with torch.no_grad():
            weight[0, 0, 0, 0] = zero
        prints.add(vlm.features._fingerprint(config, encoder))
    assert len(prints) == 1


def test_a_set_listed_twice_has_its_features_once(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**FROZEN, "model.image": ENCODERS["feature map"], "data.features": str(tmp_path / "kept")}
    once = make_config(settings)
    twice = make_config({**settings, "data.splits.train": once.data.splits.train * 2})
    made: list[Path] = []
    write = vlm.features._write
    monkeypatch.setattr(vlm.features, "_write", lambda file, tensors: (made.append(file), write(file, tensors)))
    files = features_of(twice).files
    assert made == list(files)
    assert len(files) == 3
    assert features_of(once).files == files


def test_augmentations_repeat_after_their_number_of_epochs(make_config: MakeConfig, tmp_path: Path) -> None:
    for features in (None, str(tmp_path / "kept")):
        config = make_config({**FROZEN, "model.image": ENCODERS["feature map"], "data.features": features})
        loader = loader_of(config)
        images = [
            {key: image for batch in loader.iterate(epoch) for key, image in zip(batch.keys, batch.images, strict=True)}
            for epoch in range(3)
        ]
        for key in images[0]:
            assert torch.equal(images[0][key], images[2][key])
        assert not all(torch.equal(images[0][key], images[1][key]) for key in images[0])


def test_ranks_make_a_share_each(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    config = make_config({**FROZEN, "model.image": ENCODERS["feature map"], "data.features": str(tmp_path / "kept")})
    with pytest.raises(OSError, match="No such file"):  # the other rank's
        features_of(config, Ranks(1, 2, torch.device("cpu")))
    assert len(list(tmp_path.glob("kept/*/*.safetensors"))) == 1
    assert len(features_of(config, Ranks(0, 1, torch.device("cpu"))).files) == 3


def test_ranks_that_look_at_different_moments_leave_nothing_out(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rank finds what the first has made by then."""
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    config = make_config({**FROZEN, "model.image": ENCODERS["feature map"], "data.features": str(tmp_path / "kept")})
    with pytest.raises(OSError, match="No such file"):
        features_of(config, Ranks(0, 2, torch.device("cpu")))
    assert len(features_of(config, Ranks(1, 2, torch.device("cpu"))).files) == 3


def test_a_broken_image_is_counted_as_without_features(make_config: MakeConfig, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "broken", source="broken", samples_per_shard=100) as writer:
        for number in range(8):
            writer.write(f"k{number}", b"\xff\xd8\xff broken" if number == 3 else _jpeg(), captions=["a square"])
    settings = {**FROZEN, "model.image": ENCODERS["feature map"], "data.splits.train": [str(tmp_path / "broken")]}
    for features in (None, str(tmp_path / "kept")):
        loader = loader_of(make_config({**settings, "data.features": features, "data.max_bad_fraction": 0.5}))
        batch = next(loader.iterate(0))
        assert batch.filled == {"undecodable image": 1}
        assert float(batch.texts.weight.sum()) == 7


def _jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 10, 10)).save(file, "jpeg")
    return file.getvalue()


def test_what_does_not_go_with_features_is_refused(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**FROZEN, "model.image": ENCODERS["feature map"], "data.features": str(tmp_path / "kept")}
    for change, message in (
        ({"data.views": None}, r"set data\.views"),
        ({"data.views": 0}, r"data\.views=0"),
        ({"data.blank_images": True}, r"which data\.blank_images needs"),
        ({"data.order": "resampled", "data.epoch_samples": 8}, r"use exact"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config({**settings, **change})
    trained = {"name": "resnet10t", "image_size": 32, "stages": 2}
    with pytest.raises(ConfigError, match=r"set model\.image\.frozen to true"):
        features_of(make_config({**settings, "model.image": trained}))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"lower data\.views"):
        features_of(make_config(settings))


def test_a_full_disk_leaves_no_file(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any, file: Path) -> None:
        file.write_bytes(b"begun")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(vlm.features, "save_tensors", fail)
    config = make_config({**FROZEN, "model.image": ENCODERS["feature map"], "data.features": str(tmp_path / "kept")})
    with pytest.raises(UserError, match=r"No space left on device.*free space"):
        features_of(config)
    assert [path for path in (tmp_path / "kept").rglob("*") if path.is_file()] == []


def test_tokens_for_an_encoder_that_is_trained_are_refused(make_config: MakeConfig) -> None:
    config = make_config({"model.image": {"name": "resnet10t", "image_size": 32, "stages": 2}})
    sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache)
    encoder = build_parts(config, sets).model.image_encoder
    with pytest.raises(ValueError, match="tokens of a frozen backbone"):
        encoder(torch.zeros(1, encoder.tokens(), encoder.dim))
