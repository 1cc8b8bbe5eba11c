"""Drawn scenes in shards, and a model so small that a run of a few steps takes a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vlm.config import Config
from vlm.data.synthetic import write_scenes
from vlm.settings import config_from_dict
from vlm.settings_check import check
from vlm.train.report import read_json_lines

SETTINGS: dict[str, Any] = {
    "task": "captioning",
    "model.image": {"name": "resnet10t", "image_size": 32, "stages": 2},
    "model.text": {
        "dim": 32,
        "heads": 2,
        "layers": 2,
        "feed_forward_dim": 64,
        "max_positions": 48,
        "cross_attention": [0, 1],
    },
    "model.embed_dim": 16,
    "tokenizer.vocab_size": 120,
    "data.batch_size": 8,
    "data.streams": 4,
    "data.workers": 0,
    "data.max_tokens": 32,
    "data.randaugment": None,
    "optimizer.lr": 2e-3,
    "optimizer.warmup_steps": 2,
    "train.epochs": 1,
    "train.precision": "fp32",
    "train.log_every": 1,
    "train.evaluate_images": 12,
    "generation.beams": 1,
    "generation.max_length": 6,
    "generation.min_length": 1,
}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 scenes in train, 13 in val, 32 px: six steps an epoch of eight images."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 48, 13, size=32, samples_per_shard=16)
    return folder


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact equality is promised there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


StateAndLog = tuple[Any, list[dict[str, Any]]]
TIMES = ("samples_per_second", "data_wait", "eta_seconds", "tflops", "memory_gib")


@pytest.fixture(scope="session")
def left_by() -> Callable[[Path | str], StateAndLog]:
    """left_by(out): a run's last state, tensors as lists, and its log without what depends on the clock."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value.tolist() if isinstance(value, torch.Tensor) else value

    def left(out: Path | str) -> StateAndLog:
        state = torch.load(f"{out}/latest/training/state.pt", weights_only=True)
        lines = read_json_lines(Path(out) / "log.jsonl")
        return plain(state), [{k: v for k, v in line.items() if k not in TIMES} for line in lines]

    return left


@pytest.fixture
def nested(scenes: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """nested({"train.epochs": 2}): the settings of a tiny run with these in place of the usual ones, as YAML would give them."""

    def make(changes: dict[str, Any] | None = None) -> dict[str, Any]:
        splits = {"data.splits.train": [f"{scenes}/train"], "data.splits.val": [f"{scenes}/val"]}
        values: dict[str, Any] = {}
        for key, value in {**SETTINGS, **splits, "out": str(tmp_path / "run"), **(changes or {})}.items():
            *path, name = key.split(".")
            section = values
            for part in path:
                section = section.setdefault(part, {})
            section[name] = dict(value) if isinstance(value, dict) else value
        return values

    return make


@pytest.fixture
def make_config(nested: Callable[..., dict[str, Any]]) -> Callable[..., Config]:
    """make_config({"train.epochs": 2}): the same, checked."""

    def make(changes: dict[str, Any] | None = None) -> Config:
        config = config_from_dict(nested(changes), "test")
        check(config)
        return config

    return make


@pytest.fixture
def configured(
    nested: Callable[..., dict[str, Any]], tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., tuple[Path, Path]]:
    """configured("name", settings): the file of a run's settings, those of the test's module (SETTINGS) beside them, and its folder."""

    def make(name: str, settings: dict[str, Any]) -> tuple[Path, Path]:
        out, file = tmp_path / name, tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(nested({**request.module.SETTINGS, **settings, "out": str(out)})))
        return file, out

    return make
