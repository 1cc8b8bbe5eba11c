"""One request to stop is one, however often it is passed on; a person who insists is obeyed at once."""

import os
import signal

import pytest

from vlm.train import stopping
from vlm.train.stopping import SIGNALS, StopRequest


def test_each_signal_makes_a_request_and_handlers_are_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    for number in SIGNALS:
        with StopRequest() as stop:
            assert not stop.made
            os.kill(os.getpid(), number)
            assert stop.made
        assert [signal.getsignal(n) for n in SIGNALS] == before
        assert f"{number.name}: saving after this step" in capsys.readouterr().err


def test_handlers_are_given_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_passed_on_twice_does_not_interrupt_the_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # at once: by torchrun
        now += 30
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
