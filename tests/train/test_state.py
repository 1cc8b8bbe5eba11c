"""The training state comes back as it was, is never unpickled into anything but tensors and plain values, and fails in one line."""

import pickle
import resource
from pathlib import Path

import pytest
import torch

from vlm.errors import CheckpointError
from vlm.train.state import load_state, random_state, restore_random_state, save_state

CPU = torch.device("cpu")


def test_round_trip(tmp_path: Path) -> None:
    state = {
        "step": 7,
        "best": None,
        "scores": {"scenes": {"CIDEr": 1.5}},
        "optimizer": {"state": {0: {"exp_avg": torch.randn(3)}}},
    }
    save_state(tmp_path, state)
    back = load_state(tmp_path)
    assert torch.equal(back["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])  # type: ignore[index]
    assert {k: back[k] for k in ("step", "best", "scores")} == {k: state[k] for k in ("step", "best", "scores")}


def test_absent_cut_or_foreign_state(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no training/state\.pt, so the run cannot go on from it; start again"
    ):
        load_state(tmp_path)
    save_state(tmp_path, {"weights": torch.randn(1000)})
    path = tmp_path / "training" / "state.pt"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"state\.pt: damaged .*; resume from another checkpoint"):
        load_state(tmp_path)


class Dangerous:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_state_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "state.pt").write_bytes(pickle.dumps(Dangerous(tmp_path / "ran"), protocol=2))
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    """torch hides it in a RuntimeError; replacing_folder knows what to do about an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"^training/state\.pt could not be written whole, the disk seems full"):
            save_state(tmp_path, {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_each_rank_gets_its_own_random_numbers_back() -> None:
    states, want = [], []
    for rank in range(2):
        torch.manual_seed(rank)
        states.append(random_state(CPU))
        want.append(torch.rand(3))
    for rank in range(2):
        restore_random_state(states, rank, 2, CPU)
        assert torch.equal(torch.rand(3), want[rank])
    assert not torch.equal(*want)


def test_with_another_number_of_ranks_the_fresh_seeds_stay() -> None:
    states = [random_state(CPU)]
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    restore_random_state(states, 1, 2, CPU)
    assert torch.equal(torch.rand(3), want)
