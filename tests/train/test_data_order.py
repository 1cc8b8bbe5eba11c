"""A run goes on in the order of samples that it began with, or not at all."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from vlm.config import Config
from vlm.data.batch import Batch
from vlm.data.synthetic import write_scenes
from vlm.errors import ConfigError
from vlm.run import train
from vlm.train.data_order import check_order, data_order
from vlm.train.stopping import StoppedOnRequest
from vlm.train.trainer import Trainer

MakeConfig = Callable[..., Config]
BASE: dict[str, Any] = {"data.splits.val": [], "data.batch_size": 8, "data.streams": None, "data.shuffle_block": 100}


@pytest.fixture
def shards(scenes: Path, tmp_path: Path) -> Path:
    """Two sources of 16 scenes each, `a` and `b`."""
    for name in ("a", "b"):
        write_scenes(tmp_path / "made" / name, 16, 1, size=32, samples_per_shard=8)
        index = tmp_path / "made" / name / "train" / "index.json"
        index.write_text(index.read_text().replace('"scenes"', f'"{name}"'))
    return tmp_path / "made"


@pytest.fixture
def settings(shards: Path) -> dict[str, Any]:
    return {**BASE, "data.splits.train": [f"{shards}/a/train", f"{shards}/b/train"]}


def keys_of_steps(monkeypatch: pytest.MonkeyPatch, stop: int = 0) -> list[list[str]]:
    """What each step is of, as a run makes it; a request to stop comes in step `stop`."""
    found: list[list[str]] = []
    original = Trainer._step

    def step(self: Trainer, micro: list[Batch], *rest: Any) -> None:
        original(self, micro, *rest)
        found.append(sorted(f"{key} {i}" for b in micro for key, i in zip(b.keys, b.image_ids.tolist(), strict=True)))
        if self.step + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_step", step)
    return found


def begun(make_config: MakeConfig, settings: dict[str, Any]) -> Config:
    """A run that was stopped after two of its four steps."""
    config = make_config(settings)
    with pytest.MonkeyPatch.context() as patch:
        keys_of_steps(patch, stop=2)
        with pytest.raises(StoppedOnRequest):
            train(config)
    return config


@pytest.fixture
def rest(make_config: MakeConfig, settings: dict[str, Any], tmp_path: Path) -> list[list[str]]:
    """The samples of the two steps that are missing, of which no step before had any."""
    with pytest.MonkeyPatch.context() as patch:
        whole = keys_of_steps(patch)
        train(make_config({**settings, "out": str(tmp_path / "whole")}))
    assert len({key for keys in whole for key in keys}) == 32
    return whole[2:]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"data.shuffle_block": 4}, "data.shuffle_block was 100 and is 4"),
        ({"data.streams": 8}, "data.streams was 64 and is 8"),
        ({"data.batch_size": 16, "train.epochs": 2}, "data.batch_size was 8 and is 16"),
        ({"data.mixture": [0.5, 1.5]}, r"data.mixture was \[1.0, 1.0\] and is \[0.5, 1.5\]"),
        (
            {"data.order": "resampled", "data.epoch_samples": 32},
            "data.order was exact and is resampled; .*epoch_samples",
        ),
    ],
)
def test_another_order_is_refused(
    make_config: MakeConfig, settings: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    config = begun(make_config, settings)
    before = Path(config.out, "config.yaml").read_bytes()
    mend = r".* Set it back \(.*/config\.yaml has the settings\), or start a new run .*--init-from .*/latest"
    with pytest.raises(
        ConfigError, match=f"in another order, and would go on with wrong ones: .*{told}{mend}"
    ) as caught:
        train(make_config({**settings, **changes}), resume=True)
    assert "\n" not in str(caught.value)
    assert Path(config.out, "config.yaml").read_bytes() == before


def test_swapped_folders_are_refused(make_config: MakeConfig, settings: dict[str, Any]) -> None:
    begun(make_config, settings)
    swapped = {**settings, "data.splits.train": settings["data.splits.train"][::-1]}
    with pytest.raises(ConfigError, match=r"data\.splits\.train was of a, b and is of b, a\."):
        train(make_config(swapped), resume=True)


@pytest.mark.parametrize(
    ("size", "told"),
    [(5, "2 shards of 16 records and is 4 shards of 16 records"), (12, "2 .* 16 records, but their names or sizes")],
)
def test_shards_that_were_rewritten_are_refused(
    make_config: MakeConfig, settings: dict[str, Any], shards: Path, size: int, told: str
) -> None:
    begun(make_config, settings)
    shutil.rmtree(shards / "b")
    write_scenes(shards / "b", 16, 1, size=32, samples_per_shard=size)
    index = shards / "b" / "train" / "index.json"
    index.write_text(index.read_text().replace('"scenes"', '"b"'))
    with pytest.raises(ConfigError, match=rf"data\.splits\.train\.1 \(b\) was {told}"):
        train(make_config(settings), resume=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.accumulate": 2},
        {"data.workers": 1},
        {"optimizer.lr": 1e-4, "train.log_every": 3, "train.save_every": 1, "data.mixture": [1, 1]},
    ],
)
def test_what_does_not_touch_the_order_may_change(
    make_config: MakeConfig,
    settings: dict[str, Any],
    rest: Any,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun(make_config, settings)
    found = keys_of_steps(monkeypatch)
    train(make_config({**settings, **changes}), resume=True)
    assert found == rest


def test_the_same_shards_may_lie_elsewhere(
    make_config: MakeConfig, settings: dict[str, Any], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder, and at an address, where a new run of these settings would have another number of streams."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    settings = {**settings, "data.batch_size": 12, "train.epochs": 2}  # 72 streams here, 64 there
    with pytest.MonkeyPatch.context() as patch:
        whole = keys_of_steps(patch)
        train(make_config({**settings, "out": str(tmp_path / "whole")}))
    with pytest.MonkeyPatch.context() as patch:
        keys_of_steps(patch, stop=1)
        with pytest.raises(StoppedOnRequest):
            train(make_config(settings))
    shutil.move(shards / "a", tmp_path / "moved")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        places = [str(tmp_path / "moved" / "train"), f"http://127.0.0.1:{server.server_port}/b/train"]
        found = keys_of_steps(monkeypatch)
        elsewhere = {"data.splits.train": places, "data.cache.folder": str(tmp_path / "cache")}
        train(make_config({**settings, **elsewhere}), resume=True)
    finally:
        server.shutdown()
        server.server_close()
    assert found == whole[1:]
    assert len(found) == 3


def test_a_state_of_before_goes_on(
    make_config: MakeConfig, settings: dict[str, Any], rest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = begun(make_config, settings)
    path = Path(config.out, "latest", "training", "state.pt")
    state = torch.load(path, weights_only=True)
    del state["order"]
    torch.save(state, path)
    found = keys_of_steps(monkeypatch)
    train(make_config(settings), resume=True)
    assert found == rest


def test_what_was_not_known_is_not_compared(make_config: MakeConfig) -> None:
    now = data_order(make_config(BASE).data, 0, 64, [])
    check_order(None, now, "run")
    check_order(now, None, "run")
    check_order({key: value for key, value in now.items() if key != "seed"}, now, "run")
    with pytest.raises(ConfigError, match=re.escape("seed was 1 and is 0.")):
        check_order({**now, "seed": 1}, now, "run")
