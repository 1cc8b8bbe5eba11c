"""Files of torch's, which are pickles: tensors are read from them, nothing in them is run."""

import pickle
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from vlm.errors import CheckpointError


def read_pickled(file: Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file, by torch's reader that knows tensors and plain values only. key: under which it may stand beside other things.

    Raises CheckpointError: it cannot be read, holds anything else that would have to be run, or no state dict.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the number of a pickle's protocol
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds; for the user they are one
        raise CheckpointError(f"{file} cannot be read as weights: {_reason(error)}.") from None
    if key is not None and isinstance(state, dict):
        state = state.get(key, state)
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items())
    ):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, expected a state dict: tensors by name.")
    return dict(state)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}"
    named = re.search(r"Unsupported (?:global|class|type)\W*(?:GLOBAL )?([\w.]+)", str(error))
    if named:
        return (
            f"it names {named[1]}, which is more than tensors and plain values and may run any program. "
            "Download it from its authors, or save its state dict alone where you trust it"
        )
    if isinstance(error, pickle.UnpicklingError):
        return "a pickle of something else than tensors and plain values, which may run any program; download it again"
    return f"damaged, or not a file of torch's ({type(error).__name__}); download it again"
