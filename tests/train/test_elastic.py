"""A rank is killed: all are started anew, by torchrun, and the run goes on from its last state to the end that it would have come to."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlm.train.report import read_json_lines

LEARNED = ("step", "loss", "captioning/loss", "captioning/accuracy", "gradient_norm", "lr", "filled")
SETTINGS: dict[str, Any] = {
    "train.deterministic": True,
    "train.averaging": 0.5,
    "train.save_every": 2,
    "train.epochs": 1,  # six steps
    "data.splits.val": [],
    "data.workers": 1,
}
# A rank that kills itself in a step, once: what is left of a rank whose machine fails, or whose memory ran out.
DYING = """
import os, signal
from vlm.train.trainer import Trainer

step = Trainer._step

def dies(self, *given):
    step(self, *given)
    if self.step + 1 == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

Trainer._step = dies
"""
COMMAND = DYING + "import sys\nfrom vlm.cli import main\nsys.exit(main(['train', sys.argv[1], '--resume', 'auto']))\n"
# As torchrun, but in forks of a process that has imported everything and computed nothing: two ranks; when one fails the other is told to stop.
AGENT = (
    "import json, sys\nfrom vlm.cli import main\nimport vlm.run\n"
    + DYING
    + """
def rank(number, config, port, restarts):
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
    os.dup2(2, 1)
    return main(["train", config, "--resume", "auto"])

for line in sys.stdin:
    given, children = json.loads(line), {}
    for number in range(2):
        child = os.fork()
        if child == 0:
            status = 99
            try:
                status = rank(number, **given)
            finally:
                sys.stderr.flush()
                os._exit(status)
        children[child] = number
    ended = {}
    while len(ended) < 2:
        child, status = os.wait()
        ended[children[child]] = os.waitstatus_to_exitcode(status)
        if status:
            for other, number in children.items():
                if number not in ended:
                    os.kill(other, signal.SIGTERM)
    print(json.dumps([ended[0], ended[1]]), flush=True)
"""
)
Start = Callable[..., list[int]]


@pytest.fixture(scope="module")
def agent() -> Iterator[Start]:
    """agent(config file, restarts): starts two ranks, of which the second dies in step 4 where `restarts` is 0; their exit statuses."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONFAULTHANDLER"] = "1"  # a rank that dies by itself says where
    process = subprocess.Popen(
        [sys.executable, "-c", AGENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def start(config: Path, restarts: int) -> list[int]:
        assert process.stdin is not None
        assert process.stdout is not None
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = found.getsockname()[1]
        order = {"config": str(config), "port": port, "restarts": restarts}
        print(json.dumps(order), file=process.stdin, flush=True)
        statuses: list[int] = json.loads(process.stdout.readline())
        return statuses

    try:
        yield start
    finally:
        process.stdin.close()
        process.wait(60)


def same_end(out: Path, whole: Path) -> None:
    """Weights, and what the log says of learning."""
    weights, expected = (load_file(folder / "latest" / "model.safetensors") for folder in (out, whole))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    logs = [
        [{name: line[name] for name in LEARNED} for line in read_json_lines(folder / "log.jsonl")]
        for folder in (out, whole)
    ]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5, 6]
    assert logs[0] == logs[1]


def test_a_run_in_pieces_goes_on_after_a_rank_was_killed(agent: Start, configured: Callable[..., Any]) -> None:
    whole, whole_out = configured("whole", {"train.sharding": "fsdp"})
    assert agent(whole, restarts=1) == [0, 0]
    config, out = configured("killed", {"train.sharding": "fsdp"})
    first, second = agent(config, restarts=0)
    assert second == -signal.SIGKILL
    assert first not in (0, 3)  # it did not end, and did not claim to have saved
    assert torch.load(out / "latest" / "training" / "state.pt", weights_only=True)["step"] == 2
    assert agent(config, restarts=1) == [0, 0]
    same_end(out, whole_out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_torchrun_restarts_a_run_whose_rank_was_killed(
    agent: Start, configured: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    whole, whole_out = configured("whole", {"train.sharding": kind})
    assert agent(whole, restarts=1) == [0, 0]
    config, out = configured("killed", {"train.sharding": kind})
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    command = [
        *(Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"),
        *(script, config),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "going on from step 2" in done.stderr
    same_end(out, whole_out)
