"""Checkpoints made ready to hand on: averaged over runs, in half precision, in files of a limited size."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlm.calibration import CALIBRATED_ON, KEY
from vlm.checkpoint import ANSWERS, TRAINED_ON, read_answers, read_trained_on
from vlm.errors import CheckpointError, UserError
from vlm.model.pretrained import (
    CARD,
    TOKENIZER,
    load_metadata,
    load_pretrained,
    read_weights,
    replacing_folder,
    save_pretrained,
    save_tensors,
)


def export(checkpoints: Sequence[Path], out: Path, half: bool = False, shard_bytes: int = 5 * 2**30) -> int:
    """Writes `out` from one checkpoint folder, or the mean of several of the same shape (Wortsman et al. 2022); the bytes of its weights.

    Settings, tokenizer, model card and answer list are the first one's; the images that it was trained on are all of theirs. The state to go on
    from is left behind. half: float16 on the disk, which loads as float32; what float16 cannot hold is refused. shard_bytes: the largest file of
    weights.

    Raises:
        CheckpointError: a folder is incomplete, or they do not belong together. UserError: `out` exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists; give another --out, or remove it.")
    first = checkpoints[0]
    metadata = load_metadata(first)
    if len(checkpoints) > 1:  # the temperature is of another model
        metadata.pop(KEY, None)
    for folder in checkpoints:
        load_pretrained(folder)  # refuses what does not fit its own settings
        if (folder / TOKENIZER).read_bytes() != (first / TOKENIZER).read_bytes():
            raise CheckpointError(
                f"{folder} has another tokenizer than {first}; average runs from the same start only."
            )
    state = mean({str(folder): read_weights(folder) for folder in checkpoints})
    if half:
        state = {name: in_half(name, tensor) for name, tensor in state.items()}
    known = [ids for folder in checkpoints if (ids := read_trained_on(folder)) is not None]
    with replacing_folder(out) as new:
        save_pretrained(state, new, metadata, (first / TOKENIZER).read_text(), (first / CARD).read_text(), shard_bytes)
        if known:
            save_tensors({"image_ids": torch.cat(known).unique()}, new / TRAINED_ON)
        if answers := read_answers(first):
            (new / ANSWERS).write_text(json.dumps(answers, indent=0) + "\n")
        if KEY in metadata and (first / CALIBRATED_ON).exists():
            shutil.copyfile(first / CALIBRATED_ON, new / CALIBRATED_ON)
    return sum(tensor.nbytes for tensor in state.values())


def mean(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors' means, summed in float64; whole numbers (counters) are the first one's. states: by where they come from.

    Raises:
        CheckpointError: names or shapes differ.
    """
    (source, first), *others = states.items()
    for other, state in others:
        differing = {name for name in {*first, *state} if name not in first or name not in state}
        differing |= {name for name in first if name in state and first[name].shape != state[name].shape}
        if differing:
            raise CheckpointError(
                f"{other} is another model than {source}: {len(differing)} tensors differ in name or shape, such as {min(differing)}; "
                "average runs of one configuration only."
            )
    if not others:
        return first
    return {
        name: torch.stack([state[name].double() for state in states.values()]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }


def in_half(name: str, tensor: Tensor) -> Tensor:
    """As float16.

    Raises:
        CheckpointError: a value is too large for it.
    """
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not half.isfinite().all():
        raise CheckpointError(
            f"{name} holds {float(tensor.abs().max()):.3g}, more than float16 can (65504); export without --half."
        )
    return half
