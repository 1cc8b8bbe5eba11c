"""Requests to stop: a cluster's SIGTERM or SIGUSR1, or Ctrl-C."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from vlm.train.report import say

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StoppedOnRequest(Exception):
    """SIGTERM, SIGUSR1 or Ctrl-C: the state is saved, or there is nothing yet that could be lost."""


class _SetUpStopped(BaseException):
    """Ends what is being set up. No Exception, which somebody on the way could take for a fault of what he does, and go on."""


@contextmanager
def stops_at_once() -> Iterator[None]:
    """While a run is set up SIGTERM and SIGUSR1 end it where it is, as nothing is lost; Ctrl-C does as everywhere else.

    Raises:
        StoppedOnRequest: one of them came.
    """
    process = os.getpid()

    def receive(number: int, _: FrameType | None) -> None:
        if os.getpid() != process:  # a fork, of whoever sets up in parallel: it ends as any process does
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise _SetUpStopped(signal.Signals(number).name)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    except _SetUpStopped as request:
        say(f"{request}: leaving before the first step.")
        raise StoppedOnRequest from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
