"""Where a run can be watched beside log.jsonl, which is always written: TensorBoard, Weights & Biases, trackio.

None of them can stop a training: one that fails is named in a line and left out from then on.
"""

import dataclasses
import importlib
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vlm.config import Config
from vlm.errors import ConfigError
from vlm.files import replace_text
from vlm.train.report import JsonLines, say
from vlm.train.samples import Sample, labelled, open_picture

PROJECT = "vlm"
NEEDED = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """What shows a run's numbers and pictures as it goes on."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step by name."""
        ...

    def pictures(self, step: int, name: str, samples: Sequence[Sample]) -> None:
        """What the model said of some pictures of the set `name`."""
        ...

    def close(self) -> None:
        """The run has ended or stops; what waits is written."""
        ...


@dataclasses.dataclass(frozen=True)
class Run:
    """What a tracker is told of a run. folder: the run's. id: kept in the folder, so that a run that goes on is the same one. settings: flat.
    step: the one that it goes on from, 0 for a new run."""

    folder: Path
    id: str
    settings: dict[str, Any]
    step: int


class TensorBoard:
    """Event files in the run's folder: tensorboard --logdir RUN."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None)
        if not run.step:
            rows = "\n".join(f"| {name} | {value} |" for name, value in run.settings.items())
            self.writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def pictures(self, step: int, name: str, samples: Sequence[Sample]) -> None:
        import numpy as np

        for number, sample in enumerate(samples):
            self.writer.add_image(f"{name}/{number}", np.asarray(labelled(sample)), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases, as its own variables say (WANDB_PROJECT, WANDB_MODE=offline, ...); files in the run's folder."""

    def __init__(self, run: Run) -> None:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=str(run.folder),
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=run.settings,
            settings=wandb.Settings(console="off", silent=True),
        )
        # An axis of our own: wandb's counter refuses steps that a run which goes on does again.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        if not self.run.offline:
            say(f"wandb: {self.run.url}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def pictures(self, step: int, name: str, samples: Sequence[Sample]) -> None:
        images = [self.wandb.Image(open_picture(sample), caption=sample.text) for sample in samples]
        self.run.log({"step": step, name: images})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """trackio, in its local folder (TRACKIO_DIR): trackio show --project vlm."""

    def __init__(self, run: Run) -> None:
        import trackio

        self.trackio = trackio
        with redirect_stdout(sys.stderr):  # it tells where it is on stdout, which is not for progress
            self.run = trackio.init(project=PROJECT, name=run.id, config=run.settings, resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def pictures(self, step: int, name: str, samples: Sequence[Sample]) -> None:
        images = {
            f"{name}/{number}": self.trackio.Image(open_picture(sample), caption=sample.text)
            for number, sample in enumerate(samples)
        }
        self.run.log(images, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self.run.finish()


TRACKERS: dict[str, Callable[[Run], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


class RunLog(JsonLines):
    """log.jsonl of a run, and the trackers that its settings name; `with` closes them."""

    def __init__(self, config: Config, step: int) -> None:
        """step: the one that the run goes on from; 0 begins a new log.

        Raises:
            UserError: the log cannot be written.
        """
        folder, names = Path(config.out), dict.fromkeys(config.train.trackers)
        super().__init__(folder / "log.jsonl", last_step=step or None)
        self.trackers: dict[str, Tracker] = {}
        if names:
            run = Run(folder, _run_id(folder, new=step == 0), flat(dataclasses.asdict(config)), step)
            for name in names:
                self._guarded(name, partial(self._start, name, run))

    def write(self, **values: Any) -> None:
        """Adds a line, and tells the trackers the numbers of training lines and of evaluations.

        Raises:
            UserError: the log cannot be written.
        """
        super().write(**values)
        if values["kind"] == "train":
            numbers = {f"train/{name}": float(v) for name, v in values.items() if name not in ("kind", "step")}
        elif values["kind"] == "evaluation":
            numbers = {f"evaluation/{name}": float(value) for name, value in flat(values["scores"], "/").items()}
        else:
            return
        self._each(lambda tracker: tracker.log(values["step"], numbers))

    def pictures(self, step: int, samples: Mapping[str, Sequence[Sample]]) -> None:
        """Shows what the model said of some pictures, by the name of their set."""
        for name, chosen in samples.items():
            self._each(partial(_show, step, f"samples/{name}", chosen))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._each(lambda tracker: tracker.close())
        self.trackers.clear()

    def _start(self, name: str, run: Run) -> None:
        self.trackers[name] = TRACKERS[name](run)

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            self._guarded(name, partial(tell, tracker))

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a foreign service thinks of: the training does not depend on it
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            say(f"{name} failed ({reason}) and is left out from here on; log.jsonl goes on.")
            self.trackers.pop(name, None)


def _show(step: int, name: str, samples: Sequence[Sample], tracker: Tracker) -> None:
    tracker.pictures(step, name, samples)


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers whose packages are not there.

    Raises:
        ConfigError: names the extra.
    """
    for name in names:
        try:
            importlib.import_module(NEEDED[name])
        except ImportError as error:
            extra = "trackio" if name == "trackio" else "log"
            raise ConfigError(
                f"train.trackers names {name}, which cannot be used here ({error}): pip install 'vlm-fusion[{extra}]', or leave {name} out."
            ) from None


def flat(values: Mapping[str, Any], joint: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, the names joined; tuples as lists."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, joint, f"{prefix}{name}{joint}")
        else:
            found[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def _run_id(folder: Path, new: bool) -> str:
    """The run's name for trackers, which is written into its folder."""
    path = folder / "run_id"
    if new or not path.exists():
        letters = "".join(c if c.isascii() and c.isalnum() else "-" for c in folder.resolve().name)
        replace_text(path, f"{letters}-{secrets.token_hex(4)}\n")
    return path.read_text().strip()
