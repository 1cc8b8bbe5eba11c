"""Checkpoint folders: config.json, model.safetensors (sharded above a size), tokenizer.json, README.md.

A folder is written beside its place and moved there whole, so that a full disk or a kill leaves what was there. Weights are read from safetensors
only: nothing is unpickled.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.config import ImageConfig, ModelConfig, TextConfig
from vlm.errors import CheckpointError, UserError
from vlm.model.vision_language import VisionLanguageModel

CONFIG, WEIGHTS, INDEX, TOKENIZER, CARD = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "README.md",
)
TEXT_ONLY = "text"
"""The task of a folder that holds a text encoder and nothing else."""


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill; when the block ends well it takes the place of `target`, otherwise it is removed and `target` stays as it was.

    Raises:
        UserError: the disk is full or not writable.
    """
    new, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        restore_folder(target)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        yield new
        _flush(new)
        if target.exists():
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        # safetensors wraps a full disk in an error of its own.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"{target}: could not be saved ({reason}); what was there before is untouched. Free space or choose another folder."
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
        restore_folder(target)


def _flush(folder: Path) -> None:
    """Waits until all files are on the disk: some file systems tell only now that they are full, and a power cut must not find names without data."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def restore_folder(target: Path) -> None:
    """Undoes a replacement that was cut between its two renames."""
    old = target.with_name(f".{target.name}.old")
    if not old.exists():
        return
    if not target.exists():
        time.sleep(0.2)  # another process may be saving at this moment, and is between its renames for less than that
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(target)


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """A new safetensors file, which those may read who may read other new files: safetensors 0.8 lets nobody but its owner (its issue 782).

    Raises OSError, or SafetensorError for a full disk.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata=metadata)
    file.chmod(mode)


def save_pretrained(
    state: dict[str, Tensor],
    folder: Path,
    metadata: dict[str, Any],
    tokenizer_json: str,
    card: str,
    shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a checkpoint's files into `folder`, which exists (see `replacing_folder`). state: the model's, any device."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    shards = _split(tensors, shard_bytes)
    if len(shards) == 1:
        save_tensors(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    else:
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_tensors({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names, file))
        total = sum(t.nbytes for t in tensors.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    (folder / TOKENIZER).write_text(tokenizer_json)
    (folder / CARD).write_text(card)
    (folder / CONFIG).write_text(json.dumps(metadata, indent=2) + "\n")


def load_metadata(folder: str | Path) -> dict[str, Any]:
    """What config.json says: model, text, vqa and generation settings, task.

    Raises:
        CheckpointError: the folder or the file is missing or damaged.
    """
    folder = Path(folder)
    restore_folder(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such checkpoint folder; give a folder that holds {CONFIG}, {WEIGHTS} and {TOKENIZER}."
        )
    try:
        metadata = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: {CONFIG} is missing; it is no checkpoint folder, or was copied in part.{_hint(folder)}"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: not readable as JSON ({error}); copy the checkpoint again."
        ) from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("model"), dict):
        raise CheckpointError(
            f"{folder / CONFIG}: has no `model` settings; it was not written by this library (see `vlm convert`)."
        )
    return metadata


def model_config(metadata: dict[str, Any], source: str = CONFIG) -> ModelConfig:
    """The model's settings from `load_metadata`."""
    values = dict(metadata["model"])
    if metadata.get("task") == TEXT_ONLY:
        raise CheckpointError(
            f"{source}: holds a text encoder without an image encoder; start a training from it with --init-from."
        )
    try:
        image = ImageConfig(**values.pop("image"))
        text_values = values.pop("text")
        text = TextConfig(**{**text_values, "cross_attention": tuple(text_values["cross_attention"])})
        if "heads" in values:  # older checkpoints have all
            values["heads"] = tuple(values["heads"])
        return ModelConfig(image=image, text=text, **values)
    except (KeyError, TypeError, ValueError) as error:
        raise _unfit(source, error) from None


def _unfit(source: str, error: Exception) -> CheckpointError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return CheckpointError(
        f"{source}: model settings do not fit this version ({reason}); copy the checkpoint again, or update the library."
    )


def load_pretrained(
    folder: str | Path, change: Callable[[ModelConfig], ModelConfig] = lambda config: config
) -> tuple[VisionLanguageModel, dict[str, Any]]:
    """The model (on the CPU, in evaluation mode) and the metadata of a checkpoint folder. `change`: settings to replace before it is built.

    Raises:
        CheckpointError: a file is missing, of another size than it says, a pickle, or has names or shapes that do not fit.
    """
    folder = Path(folder)
    metadata = load_metadata(folder)
    config = change(model_config(metadata, str(folder / CONFIG)))
    try:
        model = VisionLanguageModel(config, load=False)
    except UserError:
        raise
    except Exception as error:  # a damaged value can show itself anywhere
        raise _unfit(str(folder / CONFIG), error) from None
    load_state(model, read_weights(folder), str(folder))
    return model.eval(), metadata


def load_state(model: torch.nn.Module, state: dict[str, Tensor], source: str, settings: str = CONFIG) -> None:
    """Loads strictly, in the model's precision. settings: what the model was made from, for messages.

    Raises:
        CheckpointError: names the first missing, unexpected or misshapen tensors.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unexpected or wrong:
        parts = [
            f"{len(items)} {what} ({', '.join(items[:3])})"
            for what, items in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
            if items
        ]
        raise CheckpointError(f"{source}: the weights do not fit {settings}: {'; '.join(parts)}.")
    model.load_state_dict(state)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or its shards.

    Raises:
        CheckpointError: missing, cut short, or not safetensors.
    """
    if (folder / INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(f"{folder / INDEX}: not readable; copy the checkpoint again.") from None
        for name in names:
            if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder / INDEX}: names {name!r}, which is no .safetensors file inside the folder; it cannot be trusted."
                )
    else:
        names = [WEIGHTS]
    state: dict[str, Tensor] = {}
    for name in names:
        state.update(_read_file(folder, name))
    return state


def _read_file(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{folder}: {name} is missing.{_hint(folder)}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        if not path.is_file():
            raise CheckpointError(f"{path}: not a file; expected weights as safetensors.") from None
        size = f"{path.stat().st_size:,} bytes"
        if _is_pickle(path):
            raise CheckpointError(
                f"{path}: a pickle ({size}), which is never loaded, as it may run any program; expected safetensors."
            ) from None
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({size}): cut short or damaged ({error}); copy it again."
        ) from None


def _is_pickle(path: Path) -> bool:
    """By the first bytes: torch's archives are zip files, older ones and plain pickles begin with the number of their protocol."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError:
        return False
    return start == b"PK" or (start[:1] == b"\x80" and start[1:] <= b"\x05")


def _hint(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"})
    if pickles:
        return f" {pickles[0]} is a pickle and is never loaded from a checkpoint folder; convert it with `vlm convert`."
    inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    return f" Did you mean {folder / inside[0]}?" if inside else ""


def _split(tensors: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
