"""Trackers: what is told them arrives, a run that goes on stays one run, and none of them can stop a training."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.config import Config
from vlm.data.page import thumbnail
from vlm.errors import ConfigError
from vlm.run import train
from vlm.train import trackers
from vlm.train.report import read_json_lines
from vlm.train.samples import Said, Sample
from vlm.train.trackers import RunLog, check_trackers, flat

SAMPLES = {
    "scenes": [
        Sample(thumbnail(Image.new("RGB", (40, 20), "red"), 40), f"k{i}", (Said("caption", "a <red> thing"),))
        for i in (0, 1)
    ]
}


class Recorder:
    """A tracker that remembers."""

    def __init__(self, run: trackers.Run) -> None:
        self.run, self.told = run, list[tuple[Any, ...]]()

    def log(self, step: int, values: Any) -> None:
        self.told.append((step, dict(values)))

    def pictures(self, step: int, name: str, samples: Any) -> None:
        self.told.append((step, name, len(samples)))

    def close(self) -> None:
        self.told.append(("closed",))


class Broken(Recorder):
    """A tracker whose service is gone at the third word."""

    def log(self, step: int, values: Any) -> None:
        super().log(step, values)
        if len(self.told) == 3:
            raise ConnectionError("no route\nto host")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of the true trackers; what was made, by name."""
    found: dict[str, Any] = {}

    def maker(name: str, kind: type) -> Callable[[trackers.Run], Any]:
        def make(run: trackers.Run) -> Any:
            found[name] = kind(run)
            return found[name]

        return make

    kinds = {"wandb": Broken, "trackio": Recorder}
    monkeypatch.setattr(trackers, "TRACKERS", {name: maker(name, kind) for name, kind in kinds.items()})
    monkeypatch.setattr(trackers, "NEEDED", dict.fromkeys(kinds, "json"))
    return found


def test_numbers_scores_and_pictures_arrive_and_a_broken_tracker_is_left_out(
    made: dict[str, Any], make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config({"train.trackers": ["wandb", "trackio"], "optimizer.lr_factors": {"image_encoder": 0.5}})
    with RunLog(config, 0) as log:
        for step in (10, 20, 30, 40):
            log.write(kind="train", step=step, loss=1.0, lr=0.1)
        log.write(kind="skipped", step=41, keys=["a"])
        log.write(kind="evaluation", step=41, scores={"scenes": {"CIDEr": 4.0}}, selects=4.0, best=True)
        log.pictures(41, SAMPLES)
    told = made["trackio"].told
    assert told[:1] == [(10, {"train/loss": 1.0, "train/lr": 0.1})]
    assert told[4:] == [(41, {"evaluation/scenes/CIDEr": 4.0}), (41, "samples/scenes", 2), ("closed",)]
    assert [entry[0] for entry in made["wandb"].told] == [10, 20, 30]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["wandb failed (no route to host) and is left out from here on; log.jsonl goes on."]
    assert len(read_json_lines(Path(config.out) / "log.jsonl")) == 6
    settings = made["trackio"].run.settings
    assert settings["optimizer.lr_factors.image_encoder"] == 0.5
    assert settings["train.trackers"] == ["wandb", "trackio"]
    json.dumps(settings)


def test_a_run_that_goes_on_keeps_its_name_and_a_new_one_gets_another(
    made: dict[str, Any], make_config: Callable[..., Config]
) -> None:
    names = []
    for step in (0, 20, 0):
        RunLog(make_config({"train.trackers": ["trackio"]}), step)
        names.append(made["trackio"].run.id)
    assert names[0] == names[1] != names[2]
    assert made["trackio"].run.folder.name == "run"
    assert names[0].startswith("run-")


def test_a_run_without_trackers_has_no_name(make_config: Callable[..., Config]) -> None:
    config = make_config()
    RunLog(config, 0).write(kind="train", step=1, loss=1.0)
    assert [path.name for path in Path(config.out).iterdir()] == ["log.jsonl"]


def test_a_missing_package_ends_the_command_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Config]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config({"train.trackers": ["wandb"]})
    with pytest.raises(ConfigError, match=r"train\.trackers names wandb.*pip install 'vlm-fusion\[log\]'"):
        train(config)
    assert not Path(config.out).exists()
    check_trackers(())


def test_flat() -> None:
    assert flat({"a": {"b": (1, 2), "c": {}}, "d": 3}) == {"a.b": [1, 2], "d": 3}


def test_tensorboard_holds_scalars_and_pictures_and_drops_what_is_done_again(
    make_config: Callable[..., Config],
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config({"train.trackers": ["tensorboard"]})
    for first, steps in ((0, (10, 20, 30)), (20, (21,))):
        with RunLog(config, first) as log:
            for step in steps:
                log.write(kind="train", step=step, loss=float(step))
            log.pictures(steps[-1], SAMPLES)
    events = EventAccumulator(str(Path(config.out) / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 10.0), (20, 20.0), (21, 21.0)]
    image = events.Images("samples/scenes/1")[-1]
    assert (image.step, image.width) == (21, 270)
    assert "optimizer.lr" in str(events.Tensors("settings/text_summary")[0].tensor_proto)


def test_wandb_offline_keeps_one_run(make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    config = make_config({"train.trackers": ["wandb"]})
    for first in (0, 20):
        with RunLog(config, first) as log:
            assert list(log.trackers) == ["wandb"]
            log.write(kind="train", step=first + 1, loss=0.5)
            log.pictures(first + 1, SAMPLES)
            assert list(log.trackers) == ["wandb"]
    name = (Path(config.out) / "run_id").read_text().strip()
    files = list((Path(config.out) / "wandb").rglob("*.wandb"))
    assert files
    assert {file.name for file in files} == {f"run-{name}.wandb"}
    written = b"".join(file.read_bytes() for file in files)
    for word in (b"train/loss", b"samples/scenes", b"optimizer.lr", str(config.out).encode()):
        assert word in written


def test_wandb_without_a_key_does_not_stop_the_training(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", refuse)
    with RunLog(make_config({"train.trackers": ["wandb"]}), 0) as log:
        log.write(kind="train", step=1, loss=1.0)
        assert log.trackers == {}
    assert capsys.readouterr().err == "wandb failed (no network) and is left out from here on; log.jsonl goes on.\n"


def test_trackio_is_called_as_it_documents(monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Config]) -> None:
    """A stand-in with the functions of trackio 0.36: its own package needs an older huggingface_hub than other packages may bring."""
    calls: list[Any] = []

    def init(project: str, name: str, config: dict[str, Any], resume: str) -> Any:
        print("* Trackio project initialized")  # noqa: T201
        calls.append((project, resume))
        return types.SimpleNamespace(
            log=lambda metrics, step: calls.append((step, sorted(metrics))), finish=lambda: calls.append("finished")
        )

    fake = types.ModuleType("trackio")
    fake.init, fake.Image = init, lambda value, caption: (value.size, caption)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with RunLog(make_config({"train.trackers": ["trackio"]}), 0) as log:
        log.write(kind="train", step=5, loss=1.0)
        log.pictures(5, SAMPLES)
    pictures = ["samples/scenes/0", "samples/scenes/1"]
    assert calls == [("vlm", "allow"), (5, ["train/loss"]), (5, pictures), "finished"]


def test_a_training_with_a_broken_tracker_ends_well(
    made: dict[str, Any], make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config({"train.trackers": ["wandb", "trackio"], "train.samples": 2})
    train(config)
    told = made["trackio"].told
    assert [entry[0] for entry in told] == [1, 2, 3, 4, 5, 6, 6, 6, "closed"]
    assert told[6][1:] == ("samples/scenes", 2)
    assert "wandb failed (no route to host)" in capsys.readouterr().err
    assert (Path(config.out) / "samples/step-000006.html").exists()
