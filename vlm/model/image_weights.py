"""Load a local weights file into a timm backbone, whatever its author called the tensors."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlm.errors import CheckpointError

_WRAPPERS = ("state_dict_ema", "state_dict", "model_ema", "model")


def load_weights(backbone: Any, path: str | Path, name: str) -> None:
    """Load the file into `backbone`, a timm model `name` created without a classifier.

    Tensors are matched by name. Where the names differ, but the file holds tensors of exactly timm's shapes in timm's order (the state dict of
    another implementation of the same network), they are matched by order. The classifier is left out. Positions of another grid than the
    backbone's are resampled as timm does it. Raises CheckpointError when the file cannot be read or does not fit.
    """
    state = read_state(path)
    with torch.device("meta"):
        full = timm.create_model(name).state_dict()
    own = backbone.state_dict()
    if not own.keys() <= state.keys() and [t.shape for t in state.values()] == [t.shape for t in full.values()]:
        state = dict(zip(full, state.values(), strict=True))

    counters = {k for k in own if k.endswith("num_batches_tracked")}  # old files have none, and nothing here reads them
    missing = [k for k in own if k not in state and k not in counters]
    unexpected = [k for k in state if k not in own and k not in full]
    if missing or unexpected:
        raise CheckpointError(_mismatch(path, name, missing, unexpected))
    state = {k: t for k, t in state.items() if k in own}
    _match_grid(backbone, state)
    own = backbone.state_dict()
    for key, tensor in state.items():
        if tensor.shape != own[key].shape:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, {name} expects {tuple(own[key].shape)}; "
                "set image.name to the model that these weights belong to."
            )
    backbone.load_state_dict(state, strict=False)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a state dict saved by torch.save, which is read without running any code in it."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file; image.weights must name a .safetensors or .pth file.")
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as weights ({reason[:200]}); expected .safetensors, or a state dict of tensors only."
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, expected a state dict of tensors.")
    return {str(key).removeprefix("module."): tensor for key, tensor in state.items()}


def _match_grid(backbone: Any, state: dict[str, Tensor]) -> None:
    """Give the backbone the grid that the file's positions were trained for; the caller resizes it afterwards.

    So that the weights are loaded exactly, and resampled once.
    """
    positions = state.get("pos_embed")
    own = getattr(backbone, "pos_embed", None)
    if positions is None or own is None or positions.ndim != 3 or positions.shape[1] == own.shape[1]:
        return
    grid = backbone.patch_embed.grid_size
    prefix = own.shape[1] - grid[0] * grid[1]
    side = round((positions.shape[1] - prefix) ** 0.5)
    if side * side + prefix == positions.shape[1] and hasattr(backbone, "set_input_size"):
        patch = backbone.patch_embed.patch_size
        backbone.set_input_size(img_size=(side * patch[0], side * patch[1]))


def _mismatch(path: str | Path, name: str, missing: list[str], unexpected: list[str]) -> str:
    parts = [
        f"{label}: {keys[0]!r} and {len(keys) - 1} more"
        for label, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    return f"{path} does not fit {name}; {'; '.join(parts)}. Set image.name to the model that these weights belong to."
