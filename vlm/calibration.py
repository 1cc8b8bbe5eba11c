"""The temperature of a checkpoint's answers, stored in config.json, and the images that it, and what decides yes or no (`vlm.tasks.yes_no`), were
fitted on, in calibrated_on.safetensors."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from vlm.errors import CheckpointError
from vlm.files import replace_text, replacing
from vlm.model.pretrained import CONFIG, load_metadata

KEY = "calibration"
CALIBRATED_ON = "calibrated_on.safetensors"


def stored_temperature(metadata: dict[str, Any]) -> float:
    """The temperature that config.json has; 1 where it has none.

    Raises:
        CheckpointError: it is no number above 0.
    """
    found = metadata.get(KEY) or {}
    value = found.get("temperature", 1.0) if isinstance(found, dict) else found
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(
            f"{CONFIG}: {KEY}.temperature is {value!r}, expected a number above 0; copy the checkpoint again."
        )
    return float(value)


def store_temperature(folder: Path, temperature: float, image_ids: list[int], facts: dict[str, Any]) -> None:
    """Writes both files, each whole or not at all. image_ids: what it was fitted on. facts: what else config.json shall say about it.

    Raises:
        UserError: the folder is not writable; the temperature stays as it was.
    """
    ids = torch.tensor(sorted(set(image_ids)), dtype=torch.long)
    metadata = load_metadata(folder) | {KEY: {"temperature": temperature, **facts}}
    with replacing(folder / CALIBRATED_ON) as new:
        new.write_bytes(save({"image_ids": ids}))
    replace_text(folder / CONFIG, json.dumps(metadata, indent=2) + "\n")


def calibrated_images(folder: Path, image_ids: list[int]) -> int:
    """How many of these images the temperature was fitted on.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / CALIBRATED_ON
    if not path.exists():
        return 0
    try:
        known: Tensor = load_file(path)["image_ids"].to(torch.long)
    except Exception as error:
        raise CheckpointError(f"{path}: damaged ({error}); copy the checkpoint again.") from None
    return int(torch.isin(torch.tensor(sorted(set(image_ids)), dtype=torch.long), known).sum())
