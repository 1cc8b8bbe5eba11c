"""Saving loses nothing: killed between any two operations on files or at any moment, on a full disk, in a read-only folder."""

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vlm.checkpoint import write_checkpoint
from vlm.config import Config, TrainConfig
from vlm.errors import UserError
from vlm.model.pretrained import load_metadata, restore_folder
from vlm.train.state import load_state

FILE_EVENTS = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def save(out: Path, step: int, keep: int = 0, size: int = 40) -> None:
    """A checkpoint of which every part says its step."""
    model = nn.Linear(size, size)
    nn.init.constant_(model.weight, float(step))
    state = {"step": step, "model": model.state_dict()}
    config = Config(out=str(out), train=TrainConfig(keep=keep))
    write_checkpoint(
        out / "latest", config, model, json.dumps({"step": step}), {"s": {"step": step}}, None, ["a"], state
    )


def test_every_file_may_be_read_by_those_who_may_read_new_files(tmp_path: Path) -> None:
    """On a shared disk a checkpoint serves a group; safetensors alone would keep its files to their owner."""
    before = os.umask(0o027)
    try:
        save(tmp_path, 1)
        write_checkpoint(tmp_path / "known", Config(), nn.Linear(2, 2), "{}", {}, torch.tensor([1]), [])
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"model.safetensors", "trained_on.safetensors", "state.pt"} <= {path.name for path in files}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: "0o640" for path in files}


def step_of(folder: Path) -> int:
    """The step of a checkpoint, all parts of which are whole and of one step."""
    restore_folder(folder)
    state = load_state(folder)
    step: int = state["step"]
    weights = load_file(folder / "model.safetensors")
    assert load_metadata(folder)["scores"] == {"s": {"step": step}}
    assert (folder / "tokenizer.json").read_text() == json.dumps({"step": step})
    assert torch.equal(weights["weight"], torch.full_like(weights["weight"], step))
    assert torch.equal(state["model"]["weight"], weights["weight"])
    return step


def in_child(action: Callable[[], object]) -> int:
    """Runs it in a forked process, which may be killed; the status as os.waitpid gives it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("keep", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_killed_before_any_operation_on_a_file_the_old_or_the_new_state_is_whole(tmp_path: Path, keep: int) -> None:
    for step in range(1, 5):
        save(tmp_path, step, keep)
    number = killed = 0
    while True:
        number += 1

        def killed_there(last: int = number) -> None:
            done = 0

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal done
                if event in FILE_EVENTS and str(tmp_path) in str(arguments[0]):
                    done += 1
                    if done == last:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            save(tmp_path, step_of(tmp_path / "latest") + 1, keep)

        before = step_of(tmp_path / "latest")
        status = in_child(killed_there)
        after = step_of(tmp_path / "latest")
        if status == 0:
            break
        assert status == signal.SIGKILL
        killed += 1
        assert after in (before, before + 1)
        kept = sorted(tmp_path.glob("step-*"))
        assert all(step_of(path) == int(path.name[5:]) for path in kept)
        if keep:
            assert len(kept) >= keep
    assert after == before + 1
    assert killed > 20
    save(tmp_path, after + 1, keep)
    left = ["latest", *(f"step-{step:08d}" for step in range(after + 2 - keep, after + 2))]
    assert sorted(p.name for p in tmp_path.iterdir()) == left  # nothing of the killed ones stays


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_of_saving(tmp_path: Path, kills: int) -> None:
    """The time of one save is spread over its pieces: a moment falls between or inside them, also where torch and safetensors write."""
    draw = random.Random(0)
    save(tmp_path, 0, keep=1, size=300)
    began = time.perf_counter()
    save(tmp_path, 1, keep=1, size=300)
    took = time.perf_counter() - began
    done = 1
    for _ in range(kills):
        ear, mouth = os.pipe()
        child = os.fork()
        if child == 0:
            for step in range(done + 1, done + 1000):
                save(tmp_path, step, keep=1, size=300)
                os.write(mouth, b".")
            os._exit(0)
        os.close(mouth)
        os.read(ear, 1)  # it saves
        time.sleep(draw.uniform(0, 2 * took))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        told = 1
        while part := os.read(ear, 1000):
            told += len(part)
        os.close(ear)
        assert step_of(tmp_path / "latest") in (done + told, done + told + 1)
        done = step_of(tmp_path / "latest")
        assert all(step_of(path) == int(path.name[5:]) for path in tmp_path.glob("step-*"))


def test_a_disk_that_is_full_anywhere_leaves_the_last_state(tmp_path: Path) -> None:
    """No file may grow beyond a size, which is moved over all the files of a checkpoint."""
    save(tmp_path, 1, keep=1)
    sizes = [path.stat().st_size for path in (tmp_path / "latest").rglob("*") if path.is_file()]
    before = sorted(p.name for p in tmp_path.iterdir())
    limits = sorted({0, 1, *(max(size - 1, 0) for size in sizes)})
    assert len(limits) > 5
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match=r"latest: could not be saved \(.*what was there before is untouched"):
                save(tmp_path, 2, keep=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert step_of(tmp_path / "latest") == step_of(tmp_path / "step-00000001") == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_read_only_folder_is_refused_in_one_line_and_stays(tmp_path: Path) -> None:
    """As nobody, because permissions do not bind the superuser."""
    save(tmp_path, 1)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    tmp_path.chmod(0o555)

    def refused() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(UserError, match=r"latest: could not be saved \(Permission denied\); what was there before"):
            save(tmp_path, 2)

    try:
        assert in_child(refused) == 0
    finally:
        tmp_path.chmod(0o755)
    assert step_of(tmp_path / "latest") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_the_last_states_stay_and_share_their_files_with_latest(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000100", "step-00001000"]
    assert [step_of(tmp_path / name) for name in ("latest", "step-00000100", "step-00001000")] == [1000, 100, 1000]
    weights = "model.safetensors"
    assert (tmp_path / "latest" / weights).samefile(tmp_path / "step-00001000" / weights)
    save(tmp_path, 120, keep=2)  # gone on from 100: what comes later stays until the run is there again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000100", "step-00000120", "step-00001000"]


def test_without_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, 1, keep=1)
    assert step_of(tmp_path / "step-00000001") == 1
    assert not (tmp_path / "latest" / "config.json").samefile(tmp_path / "step-00000001" / "config.json")
