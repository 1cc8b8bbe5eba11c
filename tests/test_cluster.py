"""configs/cluster: scripts that bash can read, whose commands exist, and that stop, go on and start anew as they say.

`vlm` is a stand-in here and SLURM's commands are too; torchrun is the true one, on one node.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlm.cli import _parser
from vlm.settings import load_config

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "configs/cluster"
SCRIPTS = sorted(CLUSTER.iterdir())
# Waits for SIGUSR1 and leaves as the trainer does when its state is saved; with ONCE it fails the first time, with GO it is done at once.
VLM = """#!/usr/bin/env bash
echo "$@" >> "$TOLD"
if [ -n "${ONCE:-}" ] && mkdir "$TOLD.once.$RANK" 2>/dev/null; then exit 1; fi
if [ -n "${GO:-}" ]; then exit 0; fi
trap 'exit 3' USR1
for _ in $(seq 600); do sleep 0.1; done
exit 7
"""
SRUN = '#!/usr/bin/env bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/usr/bin/env bash\nif [ "$1" = show ]; then echo localhost; else echo "scontrol $@" >> "$TOLD"; fi\n'


def commands(script: Path) -> list[list[str]]:
    """The commands of a script and those in its first comment, continued lines joined."""
    lines = script.read_text().replace("\\\n", " ").splitlines()
    return [
        shlex.split(line.lstrip("# "), comments=True)
        for line in lines
        if re.match(r"#   \S|torchrun |srun |vlm ", line)
    ]


def test_there_are_scripts() -> None:
    assert [script.name for script in SCRIPTS] == ["slurm.sbatch", "torchrun.sh", "worker.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name != "worker.sh"], ids=lambda path: path.name)
def test_the_command_in_its_comment_trains_a_config(script: Path) -> None:
    examples = [words for words in commands(script) if any(word.endswith(".yaml") for word in words)]
    assert examples
    for words in examples:
        assert str(script.relative_to(ROOT)) in words
        known, overrides = _parser().parse_known_args(
            ["train", *words[words.index(str(script.relative_to(ROOT))) + 1 :]]
        )
        load_config(ROOT / known.config, overrides)


def test_torchrun_and_vlm_know_their_options() -> None:
    from torch.distributed.run import get_args_parser

    (words,) = [words for words in commands(CLUSTER / "torchrun.sh") if words[0] == "torchrun"]
    known = get_args_parser().parse_args([word for word in words[1:] if word != "&"])
    assert (known.no_python, known.rdzv_backend, known.max_restarts, known.training_script) == (True, "c10d", 3, "bash")
    given = ["configs/pretrain/tiny.yaml" if word == "$@" else word for word in known.training_script_args[2:]]
    (trainer,) = [words for words in commands(CLUSTER / "worker.sh") if words[0] == "vlm"]
    arguments = _parser().parse_args([trainer[1], *given])
    assert arguments.resume == "auto"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_settings_in_its_text_are_there(script: Path) -> None:
    for name in re.findall(r"\b(?:data|train|model|optimizer|objectives)\.\w+", script.read_text()):
        load_config(ROOT / "configs/pretrain/tiny.yaml", [f"--{name.replace('_', '-')}", "64"])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """start("torchrun.sh", "x.yaml", GO="1"): the script with its environment, as one of the only node."""
    for name, text in (("vlm", VLM), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    started: list[subprocess.Popen[bytes]] = []
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # `auto` is the number of processors where there is no GPU; two are enough
    (tmp_path / "sitecustomize.py").write_text("import os\nos.cpu_count = lambda: 2\n")

    def begin(script: str, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {"HEAD": f"localhost:{port}", "NODES": "1", "TOLD": str(tmp_path / "told"), "PYTHONPATH": str(tmp_path)}
        slurm = {
            "SLURM_JOB_ID": "77",
            "SLURM_NNODES": "1",
            "SLURM_JOB_NODELIST": "localhost",
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment = {**os.environ, **own, **slurm, **variables, "PATH": path}
        process = subprocess.Popen(["bash", str(CLUSTER / script), *arguments], env=environment, cwd=ROOT)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()


def told(folder: Path, lines: int) -> list[str]:
    """What was told, once it is so many lines."""
    file, end = folder / "told", time.monotonic() + 60
    while time.monotonic() < end:
        if file.exists() and len(found := file.read_text().splitlines()) >= lines:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{file.read_text() if file.exists() else 'nothing'} was told, fewer than {lines} lines")


def test_a_signal_stops_all_trainers_and_nothing_starts_them_anew(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = start("torchrun.sh", "x.yaml", "--data.workers", "2")
    assert told(tmp_path, 2) == ["train x.yaml --data.workers 2 --resume auto"] * 2
    time.sleep(0.5)  # until the stand-in listens
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 3
    assert len(told(tmp_path, 2)) == 2


def test_a_trainer_that_dies_is_started_anew(start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    assert start("torchrun.sh", "x.yaml", ONCE="1", GO="1").wait(60) == 0
    assert len(told(tmp_path, 3)) in (
        3,
        4,
    )  # the second one of the first time may have been ended before it said a word


def test_slurm_runs_the_job_again_only_after_a_stop(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    for status, requeued in ((3, True), (0, False), (1, False)):
        (tmp_path / "srun").write_text(f"#!/usr/bin/env bash\nexit {status}\n")
        assert start("slurm.sbatch", "x.yaml").wait(60) == (0 if requeued else status)
        assert (tmp_path / "told").exists() == requeued
        if requeued:
            assert told(tmp_path, 1) == ["scontrol requeue 77"]
            (tmp_path / "told").unlink()
    (tmp_path / "srun").write_text(SRUN)
    assert start("slurm.sbatch", "x.yaml", GO="1").wait(60) == 0  # through torchrun
    assert told(tmp_path, 2) == ["train x.yaml --resume auto"] * 2
