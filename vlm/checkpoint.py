"""A run's checkpoint folder: the model's files, what it was trained on, and, for `latest`, the state to go on from."""

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm.config import Config
from vlm.errors import CheckpointError
from vlm.low_rank import plain_state
from vlm.model.pretrained import replacing_folder, save_pretrained, save_tensors
from vlm.train.state import save_state

TRAINED_ON = "trained_on.safetensors"
ANSWERS = "answers.json"


def checkpoint_metadata(config: Config) -> dict[str, Any]:
    """The settings that a checkpoint carries for inference: model, prompts, generation and task."""
    return {
        "task": config.task,
        "model": asdict(config.model),
        "text": {
            "prompt": config.data.prompt,
            "question_prompt": config.data.question_prompt,
            "question_cleaning": config.data.question_cleaning,
            "max_tokens": config.data.max_tokens,
            "max_answer_tokens": config.data.max_answer_tokens,
        },
        "vqa": asdict(config.vqa),
        "generation": asdict(config.generation),
    }


def write_checkpoint(
    folder: Path,
    config: Config,
    model: nn.Module,
    tokenizer_json: str,
    scores: dict[str, Any],
    trained_on: Tensor | None = None,
    answers: list[str] | None = None,
    state: dict[str, Any] | None = None,
) -> Path:
    """Writes everything beside `folder` and moves it there whole; with a training state, it also stays as one of the last train.keep states.

    Raises:
        UserError: the disk is full or not writable; what was there stays.
    """
    metadata = checkpoint_metadata(config) | {"scores": scores}
    with replacing_folder(folder) as new:
        save_pretrained(plain_state(model), new, metadata, tokenizer_json, model_card(config, scores))
        if trained_on is not None:
            save_tensors({"image_ids": trained_on}, new / TRAINED_ON)
        if answers:
            (new / ANSWERS).write_text(json.dumps(answers, indent=0) + "\n")
        if state is not None:
            save_state(new, state)
    if state is not None and config.train.keep:
        _keep(folder, state["step"], config.train.keep)
    return folder


def _keep(folder: Path, step: int, count: int) -> None:
    """`folder` beside itself as step-N too, with the same files on the disk; the oldest go once there are more than `count` up to this step.

    Later ones, of a run that went on from an earlier state, stay until it has come so far again.
    """
    with replacing_folder(folder.with_name(f"step-{step:08d}")) as new:
        shutil.copytree(folder, new, copy_function=_link, dirs_exist_ok=True)
    known = sorted(
        (int(found[1]), path) for path in folder.parent.iterdir() if (found := re.fullmatch(r"step-(\d+)", path.name))
    )
    for _, path in [item for item in known if item[0] <= step][:-count]:
        path.rename(path.with_name(f".{path.name}.removed"))  # never a part of one under its name
    for left in (".step-*.removed", ".step-*.new"):  # by this one, or by one that was killed
        for path in folder.parent.glob(left):
            shutil.rmtree(path, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """A second name for a file, as nothing here is changed in place; a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_trained_on(folder: Path) -> Tensor | None:
    """Sorted identities (N,) of the images that a checkpoint was trained on, or None where it does not say."""
    path = folder / TRAINED_ON
    if not path.exists():
        return None
    try:
        ids: Tensor = load_file(path)["image_ids"].to(torch.long)
        return ids
    except Exception as error:
        raise CheckpointError(f"{path}: damaged ({error}); copy the checkpoint again.") from None


def read_answers(folder: Path) -> list[str]:
    """The answer list of a VQA checkpoint; empty where it has none."""
    path = folder / ANSWERS
    if not path.exists():
        return []
    try:
        answers = json.loads(path.read_text())
        if isinstance(answers, list) and all(isinstance(a, str) for a in answers):
            return answers
    except (ValueError, OSError):
        pass
    raise CheckpointError(f"{path}: not a list of answers; copy the checkpoint again.")


def model_card(config: Config, scores: dict[str, Any]) -> str:
    """README.md of a checkpoint: what it is, what it was trained on, its scores, how to use it."""
    image, text = config.model.image, config.model.text
    lines = [
        "---",
        "library_name: vlm",
        f"pipeline_tag: {'visual-question-answering' if config.task == 'vqa' else 'image-to-text'}",
        "---",
        f"# {config.model.label or Path(config.out).name}",
        "",
        f"A vision-language model ({config.task}): image encoder `{image.name}` at {image.image_size} px, "
        f"{text.layers} text layers of width {text.dim}, vocabulary {text.vocab_size}.",
        "",
        "Trained on: " + (", ".join(f"`{folder}`" for folder in config.data.splits.train) or "not recorded") + ".",
        *([f"Started from: `{config.init_from}`."] if config.init_from else []),
        "",
        "| split | score | value |",
        "| --- | --- | --- |",
        *[
            f"| {split} | {name} | {value:.4g} |"
            for split, values in scores.items()
            for name, value in values.items()
            if isinstance(value, int | float)
        ],
        "",
        "```python",
        "from vlm.predictor import Predictor",
        "",
        f'predictor = Predictor.load("{config.out}/best")',
        'print(predictor.caption(["img.jpg"])[0].text)',
        "```",
        "",
    ]
    return "\n".join(lines)
