"""What a run needs to go on as if it had never stopped: `training/` in a checkpoint folder. Read only by `--resume` of one's own run."""

from pathlib import Path
from typing import Any

import torch

from vlm.errors import CheckpointError

FOLDER, FILE = "training", "state.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values into `folder`/training. Raises OSError where that fails."""
    (folder / FOLDER).mkdir()
    try:
        torch.save(state, folder / FOLDER / FILE)
    except RuntimeError as error:  # what a full disk looks like from inside torch's archive writer
        raise OSError(f"{FOLDER}/{FILE} could not be written whole, the disk seems full; torch: {error}") from None


def load_state(folder: Path) -> dict[str, Any]:
    """Reads it back; only tensors and plain values are accepted.

    Raises:
        CheckpointError: it is absent or damaged.
    """
    path = folder / FOLDER / FILE
    if not path.exists():
        raise CheckpointError(
            f"{folder}: has no {FOLDER}/{FILE}, so the run cannot go on from it; start again, or with --init-from {folder}."
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}); resume from another checkpoint or start again."
        ) from None
    return state


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(states: list[dict[str, torch.Tensor]], rank: int, world: int, device: torch.device) -> None:
    """Puts this rank's generators back. states: of all ranks. With another number of ranks no state is this rank's, and it keeps its fresh seed."""
    if len(states) != world:
        return
    state = states[rank]
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
