"""Text weights to start a text Transformer from: a folder of transformers' BERT, or what `vlm convert bert` makes of one.

The latter is a checkpoint folder without an image encoder: `text.*` and, if its source has it, `masked_language_head.*` under our names.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.model.convert.bert import TextWeights, load_bert_folder
from vlm.model.pretrained import CONFIG, TEXT_ONLY, load_metadata, read_weights

TEXT, HEAD = "text.", "masked_language_head."


def is_text_folder(folder: str | Path) -> bool:
    """Whether `vlm convert bert` wrote a folder.

    Raises CheckpointError where it is no checkpoint folder.
    """
    return load_metadata(folder).get("task") == TEXT_ONLY


def load_text_folder(folder: str | Path) -> tuple[dict[str, Any], TextWeights]:
    """Fields of `TextConfig` and the weights under our names.

    Raises CheckpointError.
    """
    path = Path(folder)
    if not _ours(path):
        return load_bert_folder(path)
    state = read_weights(path)
    return load_metadata(path)["model"]["text"], TextWeights(_part(state, TEXT), {}, _part(state, HEAD))


def _ours(path: Path) -> bool:
    try:
        return bool(json.loads((path / CONFIG).read_text(encoding="utf-8")).get("task") == TEXT_ONLY)
    except (OSError, ValueError, AttributeError):  # told by whoever reads it as BERT's
        return False


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
