"""What a run needs to go on as if it had never stopped: `training/` in a checkpoint folder. Read only by `--resume` of one's own run.

Tensors that ranks hold in pieces (`vlm.train.sharding`) stand in `training/pieces`, safetensors that torch.distributed.checkpoint writes, each rank
its own, and reads for any other division; all else is in `training/state.pt`.
"""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.errors import CheckpointError, UserError
from vlm.tasks.task import Task
from vlm.train.distributed import Ranks
from vlm.train.optimizer import named_parameters
from vlm.train.sharding import part_of

FOLDER, FILE, PIECES = "training", "state.pt", "pieces"
NAMED = ("model", "averaged", "task")
"""Parts of a state that hold tensors by name; the optimizer's holds several by name."""


def set_aside(state: dict[str, Any], beside: Path, ranks: Ranks) -> dict[str, Any]:
    """`state` without its pieces, which are written, by all ranks, to a folder that `save_state` moves to its place. Every rank must ask.

    Raises:
        UserError: they cannot be written.
    """
    tensors = _flat(state)
    pieces = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    if not pieces:
        return state
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = beside.with_name(f"{beside.name}.{PIECES}")
    if ranks.main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    ranks.barrier()
    try:
        save(pieces, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        reason = " ".join(str(next(iter(error.failures.values()))[0]).split())[:200]
        raise UserError(
            f"{folder}: could not be written ({reason}); what was saved before is untouched. Free space, or choose an --out that all ranks reach."
        ) from None
    rest = {name: tensor for name, tensor in tensors.items() if name not in pieces}
    return state | _nested(rest, state) | {PIECES: str(folder)}


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values into `folder`/training. Raises OSError where that fails."""
    (folder / FOLDER).mkdir()
    if PIECES in state:
        Path(state[PIECES]).rename(folder / FOLDER / PIECES)
        state = state | {PIECES: sorted(path.name for path in (folder / FOLDER / PIECES).iterdir())}
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
    if PIECES in state:
        pieces = folder / FOLDER / PIECES
        if absent := [name for name in state[PIECES] if not (pieces / name).exists()]:
            raise CheckpointError(f"{pieces}: {absent[0]} is missing; resume from another checkpoint or start again.")
        state[PIECES] = str(pieces)
    return state


def fitted(state: dict[str, Any], task: Task, averaged: nn.Module | None) -> dict[str, Any]:
    """What `load_state` gave, divided as the present run divides it: whoever wrote it. Every rank must ask.

    Raises:
        CheckpointError: a piece is damaged.
    """
    modules = {"model": task.model.state_dict(), "task": task.training_state()}
    modules |= {} if averaged is None else {"averaged": averaged.state_dict()}
    own = {f"{part}/{name}": tensor for part, tensors in modules.items() for name, tensor in tensors.items()}
    parameters = named_parameters(task.model, task.learned)

    def like(name: str) -> Tensor | None:
        if name.startswith("optimizer/"):
            return parameters.get(name.split("/")[1])
        return own.get(name)

    tensors = _flat(state)
    if PIECES in state:
        tensors |= _read(Path(state[PIECES]), like)
    return state | _nested({name: part_of(tensor, like(name)) for name, tensor in tensors.items()}, state)


def _read(folder: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """The tensors that were written in pieces: this rank's new ones, or whole where `like` is."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    wanted: dict[str, Any] = {}
    try:
        for name, known in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(known, TensorStorageMetadata)
            target = like(name)
            divided = isinstance(target, DTensor) and target.shape == known.size
            wanted[name] = (
                torch.empty_like(target, requires_grad=False)
                if divided and target is not None
                else torch.empty(known.size, dtype=known.properties.dtype)
            )
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a single process reads alone
            load(wanted, storage_reader=reader)
    except (CheckpointException, Exception) as error:
        raise CheckpointError(
            f"{folder}: damaged ({type(error).__name__}); resume from another checkpoint or start again."
        ) from None
    return wanted


def _flat(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state by part and name."""
    found = {f"{part}/{name}": tensor for part in NAMED for name, tensor in (state[part] or {}).items()}
    moments = {f"optimizer/{name}/{key}": v for name, values in state["optimizer"].items() for key, v in values.items()}
    return found | moments


def _nested(tensors: dict[str, Tensor], state: dict[str, Any]) -> dict[str, Any]:
    """The parts of a state that `_flat` took apart; what `state` has none of stays None."""
    parts: dict[str, Any] = {part: {} for part in NAMED if state[part] is not None} | {"optimizer": {}}
    for name, tensor in tensors.items():
        part, *path, key = name.split("/")
        owner = parts[part] if not path else parts[part].setdefault(path[0], {})
        owner[key] = tensor
    return dict.fromkeys(NAMED) | parts


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
