"""A run that is killed or asked to stop at any step and resumed is the run that never stopped, bit for bit; its log too."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlm.train.report import read_json_lines

SETTINGS: dict[str, Any] = {
    "train.deterministic": True,
    "train.averaging": 0.9,
    "train.epochs": 1.5,  # nine steps, an evaluation after the sixth
    "train.save_every": 2,
    "train.log_every": 3,  # a line may tell of steps before a save and behind it
    "train.keep": 1,
    "train.evaluate_images": 4,
}
STEPS = 9
TEACHER = {"task": "pretraining", "objectives.momentum": 0.9, "objectives.queue": 20, "data.randaugment": [1, 5]}
# Runs the command in a fork of a process that has imported everything and computed nothing, and sends itself a signal in a step.
SERVER = """
import json, os, sys
from vlm.cli import main
import vlm.run
from vlm.train.trainer import Trainer

step = Trainer._step

def run(arguments, at, number):
    def stepped(self, *given):
        step(self, *given)
        if self.step + 1 == at:
            os.kill(os.getpid(), number)
    Trainer._step = stepped
    os.dup2(2, 1)
    return main(arguments)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = run(**json.loads(line))
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Run = Callable[..., int]


@pytest.fixture(scope="module")
def server() -> Iterator[Run]:
    """server(config file, at=0, number=SIGKILL): `vlm train CONFIG --resume auto`, a signal to itself in step `at`; its exit status."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(config: Path, at: int = 0, number: int = signal.SIGKILL) -> int:
        assert process.stdin is not None
        assert process.stdout is not None
        arguments = ["train", str(config), "--resume", "auto"]
        print(json.dumps({"arguments": arguments, "at": at, "number": number}), file=process.stdin, flush=True)
        return int(process.stdout.readline())

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait(60)


def weights(out: Path) -> list[dict[str, Any]]:
    """Those of both checkpoints, as lists."""
    files = [load_file(out / name / "model.safetensors") for name in ("latest", "best")]
    return [{name: tensor.tolist() for name, tensor in file.items()} for file in files]


@pytest.mark.parametrize(
    ("kills", "settings"),
    [(1, {"train.evaluate_images": 2}), pytest.param(20, TEACHER, marks=pytest.mark.slow)],
)
def test_killed_at_random_steps_and_resumed(
    server: Run,
    configured: Callable[..., tuple[Path, Path]],
    left_by: Callable[[Path], Any],
    kills: int,
    settings: dict[str, Any],
) -> None:
    """Weights, the whole state and the log but for its times are those of the run that nobody killed."""
    whole, whole_out = configured("whole", settings)
    assert server(whole) == 0
    want = weights(whole_out), left_by(whole_out)
    draw = random.Random(1)
    for number in range(kills):
        at = draw.randint(1, STEPS)
        parted, out = configured(f"parted{number}", settings)
        assert server(parted, at) == -signal.SIGKILL
        saved = (at - 1) // 2 * 2
        kept = [f"step-{saved:08d}"] if saved else []
        assert [p.name for p in sorted(out.glob("step-*"))] == kept
        if saved:  # what was logged after it is there, and goes
            told = max(line["step"] for line in read_json_lines(out / "log.jsonl")) if at > 3 else 0
            assert told <= at
        assert server(parted) == 0
        assert (weights(out), left_by(out)) == want, f"killed in step {at}"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_asked_to_stop_it_saves_exits_3_and_goes_on(
    server: Run, configured: Callable[..., tuple[Path, Path]], number: signal.Signals
) -> None:
    """SIGTERM, sent to the group of a run with workers, is in test_trainer.py."""
    settings = {"data.splits.val": [], "train.epochs": 0.8}
    file, out = configured(number.name, settings)
    assert server(file, 3, number) == 3
    assert torch.load(out / "latest" / "training" / "state.pt", weights_only=True)["step"] == 3
    assert server(file) == 0
    assert [line["step"] for line in read_json_lines(out / "log.jsonl")] == [3, 5]
