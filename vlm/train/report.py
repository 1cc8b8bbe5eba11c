"""What a run says while it goes on: a line for people, JSON lines of everything for programs."""

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm.files import replace_text, unwritable


def say(text: str) -> None:
    """A line on stderr, where progress goes; of several ranks only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    whole = max(0, int(seconds + 0.5))
    hours, rest = divmod(whole, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def number(value: float) -> str:
    """Short but honest: 0.0123, 1.23, 123.4."""
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.4g}"


class JsonLines:
    """log.jsonl: one object a line, `kind` says what it is. A line is written whole or not at all; a cut last line is dropped on reopening."""

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        """last_step: on resuming, what was logged beyond it is dropped, because it will be done again.

        Raises:
            UserError: the file cannot be written.
        """
        self.path = path
        kept = [] if last_step is None else [r for r in read_json_lines(path) if r.get("step", 0) <= last_step]
        replace_text(path, "".join(json.dumps(r) + "\n" for r in kept))

    def write(self, **values: Any) -> None:
        """Adds a line.

        Raises:
            UserError: the file cannot be written, for example because the disk is full.
        """
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise unwritable(self.path, error) from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines, each an object; an absent file has none."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def training_line(step: int, steps: int, epoch: float, losses: Iterable[str], values: Mapping[str, float]) -> str:
    """The line for people. losses: their names. values: as log.jsonl has them; what is not known is left out."""
    parts = " ".join(f"{name} {number(values[f'{name}/loss'])}" for name in losses)
    causes = ", ".join(f"{int(v)} {n.removeprefix('filled/')}" for n, v in values.items() if n.startswith("filled/"))
    said = [
        f"step {step}/{steps} (epoch {epoch:.2f})",
        f"loss {number(values['loss'])}",
        parts,
        f"lr {values['lr']:.2e}",
        f"{values['samples_per_second']:.1f} samples/s",
        f"{values['tflops']:.3g} TFLOP/s" if "tflops" in values else "",
        f"MFU {values['mfu']:.1%}" if "mfu" in values else "",
        f"data wait {values['data_wait']:.0%}",
        f"memory {values['memory_gib']:.3g} GiB" if "memory_gib" in values else "",
        f"{int(values['filled'])} bad samples ({causes})" if causes else "",
        f"eta {duration(values['eta_seconds'])}" if "eta_seconds" in values else "",
    ]
    return " | ".join(part for part in said if part)


class Clock:
    """Samples a second, share of time waiting for data, and time left. The first steps are left out of the estimate: they warm caches up."""

    def __init__(self, total_steps: int, done: int, skip: int = 3) -> None:
        self.total = total_steps
        self.done = done
        self.skip = skip
        self.seconds = 0.0
        self.counted = 0
        self.interval_seconds = self.interval_wait = 0.0
        self.interval_samples = 0
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Time since the last step was spent on something else (evaluation, saving)."""
        self._last = time.perf_counter()

    def step(self, samples: int, waited: float) -> None:
        """A step over `samples` has ended, of which `waited` seconds were for data."""
        now = time.perf_counter()
        took = now - self._last
        self._last = now
        self.done += 1
        self.interval_seconds += took
        self.interval_wait += waited
        self.interval_samples += samples
        if self.skip:
            self.skip -= 1
        else:
            self.seconds += took
            self.counted += 1

    def interval(self) -> dict[str, float]:
        """Since the last call: samples/s, share of time waiting; and the seconds left, by the mean step."""
        seconds = max(self.interval_seconds, 1e-9)
        figures = {"samples_per_second": self.interval_samples / seconds, "data_wait": self.interval_wait / seconds}
        if self.counted:
            figures["eta_seconds"] = (self.total - self.done) * self.seconds / self.counted
        self.interval_seconds = self.interval_wait = 0.0
        self.interval_samples = 0
        return figures
