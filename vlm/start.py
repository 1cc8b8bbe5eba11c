"""What a training's start needs beside the model's own weights: a classifier of the run's answers, and what a checkpoint may bring: the weights of
the answers that it knew, the momentum copies and the queue of the authors' files.

`vlm convert albef|blip-original --keep-momentum` writes them to momentum.safetensors; a pretraining with a teacher that starts from that folder
(`init_from`) takes them over.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlm.config import Config, Head
from vlm.data.index import ShardSet
from vlm.errors import CheckpointError, ConfigError
from vlm.model.convert.authors import Momentum
from vlm.model.initialise import load_by_name
from vlm.model.pretrained import load_metadata, model_config
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.pairs import Pairs
from vlm.objectives.teacher import Teacher

MOMENTUM = "momentum.safetensors"
MODEL, IMAGE_QUEUE, TEXT_QUEUE = "model.", "queue.image", "queue.text"
OUTPUT = "answer_head.output."
UNKNOWN_IMAGE = -1
"""Identity of a queue's images, which the files do not tell: that of no image of ours."""


def with_classifier(config: Config, answers: Sequence[str]) -> Config:
    """The settings with a classifier of the run's answers, where it learns to classify.

    Raises:
        ConfigError: the answer list is empty.
    """
    if config.task != "vqa" or config.vqa.form != "classify":
        return config
    if not answers:
        raise ConfigError(
            f"vqa.form=classify needs an answer list, and the training questions have no answer {config.vqa.min_answer_count} times; "
            "lower vqa.min_answer_count."
        )
    heads = tuple(head for head in config.model.heads if head != "classifier")
    return replace(config, model=replace(config.model, heads=(*heads, "classifier"), answers=len(answers)))


def trained_heads(config: Config) -> tuple[Head, ...]:
    """Those of `model.heads` that the run has a use for: another would stay as it began, and whoever asked it would be told noise as if it knew.

    Pretraining always compares embeddings: it is evaluated by them, and hard negatives are drawn by them.
    """
    weights = config.objectives
    used: dict[Head, bool] = {
        "contrastive": config.task == "pretraining" or config.finetune.contrastive > 0,
        "matching": config.task == "pretraining" and weights.matching > 0,
        "masked_language": config.task == "pretraining" and weights.masked_language > 0,
        "language": max(weights.captioning, weights.answering, weights.self_critical) > 0
        if config.task == "pretraining"
        else config.task == "captioning" or config.vqa.form != "classify",
        "classifier": True,  # is there only where it is trained
    }
    return tuple(head for head in config.model.heads if used[head])


def check_set_weights(config: Config, sets: Sequence[ShardSet]) -> None:
    """Refuses weights of sets that are not there, or that are none.

    Raises:
        ConfigError: names them.
    """
    sources = sorted({shards.source for shards in sets})
    for name, weight in config.vqa.set_weights.items():
        if name not in sources:
            raise ConfigError(
                f"vqa.set_weights names {name!r}, but the training shards are of {', '.join(sources)}; name one of these."
            )
        if not 0 < weight < math.inf:
            raise ConfigError(f"vqa.set_weights.{name}={weight}; expected a number above 0, e.g. 0.5.")


def known_classifier(
    state: dict[str, Tensor], known: Sequence[str], answers: Sequence[str], model: VisionLanguageModel
) -> dict[str, Tensor]:
    """A checkpoint's tensors with its classifier's outputs in the order of the run's answers, so that loading by name gives each its own.

    known: the checkpoint's answers. Answers that it does not know keep the model's start.
    """
    place = {answer: i for i, answer in enumerate(known)}
    pairs = [(i, place[answer]) for i, answer in enumerate(answers) if answer in place]
    head, weight = model.answer_head, state.get(OUTPUT + "weight")
    if head is None or weight is None or len(weight) != len(known) or not pairs:
        return {name: tensor for name, tensor in state.items() if not name.startswith(OUTPUT)}
    own = {OUTPUT + name: tensor.clone() for name, tensor in head.output.state_dict().items()}
    to, source = torch.tensor(pairs).unbind(1)
    for name, tensor in own.items():
        tensor[to] = state[name][source].to(tensor)
    return state | own


def momentum_tensors(momentum: Momentum) -> dict[str, Tensor]:
    """What momentum.safetensors holds."""
    tensors = {f"{MODEL}{name}": tensor.contiguous() for name, tensor in momentum.model.items()}
    if momentum.image_queue is not None and momentum.text_queue is not None:
        tensors |= {IMAGE_QUEUE: momentum.image_queue, TEXT_QUEUE: momentum.text_queue}
    return tensors


def start_teacher(teacher: Teacher, folder: str | Path) -> str | None:
    """Gives a new teacher the momentum weights of a checkpoint folder and fills its queue; what was done, in words, or None without such a file.

    Of a queue longer than the teacher's the newest features count; an image size of its own is kept.

    Raises:
        CheckpointError: the file is damaged, or is not of this model.
    """
    path = Path(folder) / MOMENTUM
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path}: damaged ({error}); convert the file again.") from None
    saved = model_config(load_metadata(folder), str(folder)).image.image_size
    encoder = teacher.model.image_encoder
    size = encoder.image_size
    encoder.resize(saved or size)
    weights = {name.removeprefix(MODEL): tensor for name, tensor in tensors.items() if name.startswith(MODEL)}
    report = load_by_name(teacher.model, weights)
    encoder.resize(size)
    if report.left:
        raise CheckpointError(f"{path}: {report.left[0]} does not fit the model; convert the file again.")
    text = f"{path}: {len(report.loaded)} tensors loaded into the teacher"
    image, words = tensors.get(IMAGE_QUEUE), tensors.get(TEXT_QUEUE)
    if teacher.queue is not None and image is not None and words is not None:
        ids = torch.full((len(image),), UNKNOWN_IMAGE)
        teacher.queue.push(Pairs(image, words, ids, torch.ones(len(image), dtype=torch.bool)))
        text += f", {min(len(image), teacher.queue.size)} pairs into its queue"
    return text
