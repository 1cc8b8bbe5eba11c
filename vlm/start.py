"""What a checkpoint may bring for a training's start beside its model: the momentum copies and the queue of the authors' files.

`vlm convert albef|blip-original --keep-momentum` writes them to momentum.safetensors; a pretraining with a teacher that starts from that folder
(`init_from`) takes them over.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlm.errors import CheckpointError
from vlm.model.convert.authors import Momentum
from vlm.model.initialise import load_by_name
from vlm.model.pretrained import load_metadata, model_config
from vlm.objectives.pairs import Pairs
from vlm.objectives.teacher import Teacher

MOMENTUM = "momentum.safetensors"
MODEL, IMAGE_QUEUE, TEXT_QUEUE = "model.", "queue.image", "queue.text"
UNKNOWN_IMAGE = -1
"""Identity of a queue's images, which the files do not tell: that of no image of ours."""


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
