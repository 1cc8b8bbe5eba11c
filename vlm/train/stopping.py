"""Requests to stop: a cluster's SIGTERM or SIGUSR1, or Ctrl-C."""

import signal
import time
from types import FrameType
from typing import Any

from vlm.train.report import say

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Inside a `with` block, `made` says whether someone asked; a second Ctrl-C, at least a second later, raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.made = False
        self._at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.made:
            # torchrun and cluster managers both pass a request on: what comes again soon, or from no keyboard, is the same one.
            if number == signal.SIGINT and now - self._at > 1:
                raise KeyboardInterrupt
            return
        self.made, self._at = True, now
        say(f"{signal.Signals(number).name}: saving after this step (Ctrl-C again: stop at once).")
