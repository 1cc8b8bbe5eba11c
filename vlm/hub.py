"""Checkpoints by name: a folder of ours, a folder of transformers' BLIP, or a model on the Hugging Face hub, which is downloaded once.

Weights of transformers' BLIP are converted as by `vlm convert blip` and kept in the cache folder: $VLM_CACHE, else $XDG_CACHE_HOME/vlm, else
~/.cache/vlm. Downloads are kept where huggingface_hub keeps them ($HF_HOME).
"""

import hashlib
import json
import os
import re
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlm.calibration import CALIBRATED_ON
from vlm.checkpoint import ANSWERS, TRAINED_ON
from vlm.errors import CheckpointError, UserError
from vlm.model.pretrained import CARD, CONFIG, INDEX, TOKENIZER, WEIGHTS, load_metadata, load_pretrained, read_weights
from vlm.model.vision_language import VisionLanguageModel

SHARDS = "model-*.safetensors"
OURS = (CONFIG, WEIGHTS, INDEX, SHARDS, TOKENIZER, CARD, ANSWERS, TRAINED_ON, CALIBRATED_ON)
"""What a checkpoint on the hub is made of; `training/` is nobody else's."""
CONVERSION = 2
"""Counted up when conversion makes something else of the same weights; 2: it says how questions are cleaned."""
THEIRS = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer_config.json", "vocab.txt"),
)
PICKLED = "pytorch_model.bin"
"""Downloaded only where there is nothing better; it is read with weights_only."""
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def from_pretrained(source: str | Path, revision: str | None = None) -> tuple[VisionLanguageModel, dict[str, Any]]:
    """The model (on the CPU, in evaluation mode) and the settings of what `source` names, see `local_folder`.

    Raises:
        CheckpointError: it is not to be had, incomplete or damaged.
    """
    return load_pretrained(local_folder(source, revision))


def local_folder(source: str | Path, revision: str | None = None) -> Path:
    """The checkpoint folder of what `source` names: a folder of ours, which is returned as it is; a folder of transformers' BLIP; or `owner/name` on
    the hub where no such folder is here, which may hold either. revision: the hub's branch, tag or commit.

    Raises:
        CheckpointError: the hub does not give it, or it cannot be converted. UserError: the cache folder cannot be written; a revision of a folder.
    """
    folder = source_folder(source, revision)
    if not _is_blip(folder):
        return folder
    if folder == Path(source):
        return _converted(folder, f"{folder.resolve().name}-{_fingerprint(folder)}")
    return _converted(folder, f"{str(source).replace('/', '--')}-{folder.name}")


def source_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder that `source` names, unconverted: a path, which is returned as it is, or `owner/name` on the hub where no such folder is here.

    revision: the hub's branch, tag or commit.

    Raises:
        CheckpointError: the hub does not give it. UserError: a revision of a folder.
    """
    path = Path(source)
    if _is_name(str(source)):
        return _download(str(source), revision)
    if revision is not None:
        raise UserError(f"{source} is a folder and no name on the hub; leave the revision {revision!r} out.")
    return path


def _is_name(source: str) -> bool:
    """Whether it can be a model's name and no path: runs/photos is a path where there is a folder `runs`."""
    return NAME.fullmatch(source) is not None and not Path(source).parent.exists()


def _is_blip(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type") == "blip")
    except (OSError, ValueError, AttributeError, RecursionError):  # told by whoever loads it
        return False


def _fingerprint(folder: Path) -> str:
    """Changes when a file of the folder does."""
    files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file())
    return hashlib.sha256(repr((str(folder.resolve()), files)).encode()).hexdigest()[:16]


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted = [*OURS, *THEIRS]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        if not any((folder / file).exists() for file in (WEIGHTS, INDEX)):
            # The folder is called after the commit, so that both downloads are of one.
            folder = Path(snapshot_download(name, revision=folder.name, allow_patterns=[*wanted, PICKLED]))
    except Exception as error:  # the hub's client and what lies below it raise many kinds; for the user they are one
        raise CheckpointError(
            f"{name}: no such folder here, and the hub gave no model of that name ({_reason(error)}). "
            "Check the name and the network, or download the model elsewhere and give its folder."
        ) from None
    return folder


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def cache_folder() -> Path:
    """Where converted weights are kept."""
    if own := os.environ.get("VLM_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "vlm"


def _converted(folder: Path, key: str) -> Path:
    """The conversion of a folder of transformers' BLIP, made anew by each version of the library. Several processes may ask for it at once."""
    from vlm.convert import convert_blip

    try:
        mine = version("vlm-fusion")
    except PackageNotFoundError:
        mine = "source"
    target = cache_folder() / f"{mine}-{CONVERSION}" / key
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
            made = Path(scratch) / key
            convert_blip(folder, made)
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise UserError(
            f"{target.parent} cannot be written ({error.strerror or error}); set VLM_CACHE to a folder that can."
        ) from None
    return target


def push_to_hub(folder: str | Path, name: str, private: bool | None = None, api: Any = None) -> str:
    """Uploads a checkpoint folder as the model `name` (owner/name) in one commit, with its card; its address. `training/` stays here.

    api: the hub's client, by default huggingface_hub's HfApi, with the token of `hf auth login` or $HF_TOKEN.

    Raises:
        CheckpointError: the folder is incomplete or damaged. UserError: the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    load_metadata(folder)
    read_weights(folder)
    for file in (TOKENIZER, CARD):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: {file} is missing; copy the checkpoint again.")
    files = sorted(p for p in folder.iterdir() if p.is_file() and any(p.match(pattern) for pattern in OURS))
    card = re.sub(r'Predictor\.load\("[^"]*"\)', f'Predictor.load("{name}")', (folder / CARD).read_text())
    contents: dict[str, str | bytes] = {p.name: str(p) for p in files} | {CARD: card.encode()}
    operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=content) for file, content in contents.items()]
    api = HfApi() if api is None else api
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(name, operations, commit_message=f"Checkpoint {folder.name}")
    except Exception as error:  # as above
        raise UserError(
            f"{name}: the hub refused the upload ({_reason(error)}). Log in with `hf auth login`, and check the name and the network."
        ) from None
    return str(address)
