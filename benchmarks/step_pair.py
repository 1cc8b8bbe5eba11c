"""Our pretraining step and the one built from transformers' modules, with the same weights, on the same batch: their losses and their work.

Letters: B image-text pairs, L tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from reference_steps import AlbefStep, BlipStep, Encoders, Given, ReferenceStep
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlm.config import Config
from vlm.data.batch import Batch, Masked, Texts
from vlm.model.convert.bert import TextWeights, to_bert_state_dict
from vlm.model.convert.blip import VISION, VISION_LAYER, VISION_PARAMETERS, vit_shape
from vlm.model.vision_language import VisionLanguageModel
from vlm.model.vocabulary_head import VocabularyHead
from vlm.settings import load_config
from vlm.tasks.pretraining import Pretraining

CONFIGS = Path(__file__).resolve().parents[1] / "configs/pretrain"
STEPS: dict[str, type[ReferenceStep]] = {"albef": AlbefStep, "blip": BlipStep}
CLS, SEP, MASK, WORDS = 2, 3, 4, 5


def settings(step: str, tiny: bool = False, dropout: bool = True, precision: str = "fp32") -> Config:
    """The published recipe at ViT-B/16, 256 px, without pretrained weights; BLIP with first tokens of its own, as published."""
    config = load_config(CONFIGS / f"{step}_base.yaml")
    text, objectives = config.model.text, config.objectives
    # DeiT-B is the network of ViT-B/16.
    image = replace(config.model.image, name="vit_base_patch16_224", image_size=256, pretrained=False)
    if tiny:
        image = replace(image, name="test_vit", image_size=64)
        cross = (2, 3) if step == "albef" else (0, 1, 2, 3)
        text = replace(text, dim=64, heads=2, layers=4, feed_forward_dim=96, vocab_size=60, cross_attention=cross)
        text = replace(text, max_positions=32)
        objectives = replace(objectives, queue=32)
    if not dropout:
        text = replace(text, dropout=0.0, attention_dropout=0.0)
    first_token = {}
    if step == "blip":
        first_token = {"fused": text.vocab_size, "decoder": text.vocab_size + 1}
        text = replace(text, vocab_size=text.vocab_size + 2)
    model = replace(config.model, image=image, text=text, first_token=first_token, embed_dim=16 if tiny else 256)
    train = replace(config.train, precision=precision)
    return replace(config, model=model, objectives=objectives, train=train)


def draw_batch(config: Config, pairs: int, seed: int = 0) -> Batch:
    """Captions of 8 to 25 tokens with [CLS] and [SEP], normally distributed around 13 with deviation 3; 15 % of their words are hidden.

    As the loader makes it: L is the longest caption, rounded up to a multiple of 8.
    """
    g = torch.Generator().manual_seed(seed)
    lengths = torch.normal(13.0, 3.0, (pairs,), generator=g).round().clamp(8, 25).long()
    position = torch.arange(-(-int(lengths.max()) // 8) * 8)
    words = torch.randint(WORDS, config.model.text.vocab_size - 2, (pairs, len(position)), generator=g)
    mask = position < lengths[:, None]
    ids = words.where(position < lengths[:, None] - 1, torch.tensor(SEP)).masked_fill(~mask, 0)
    ids[:, 0] = CLS
    hidden = (torch.rand(ids.shape, generator=g) < config.objectives.masking_probability) & (ids >= WORDS)
    hidden[0, 1] = True
    positions = hidden.flatten().nonzero().squeeze(1)
    size = config.model.image.image_size or 224
    ones = torch.ones(pairs)
    return Batch(
        torch.randint(0, 256, (pairs, 3, size, size), generator=g, dtype=torch.uint8),
        [f"pair{i}" for i in range(pairs)],
        torch.arange(pairs) + seed * pairs,
        Texts(ids, mask, torch.arange(pairs), ones.long(), ones, ones.bool()),
        masked=Masked(ids.masked_fill(hidden, MASK), positions, ids.flatten()[positions])
        if config.objectives.masked_language > 0
        else None,
    )


def as_published(batch: Batch, images: Tensor, pad: int) -> Given:
    """The same batch for the reference. images: normalised. pad: the texts' length, 0: the longest one's."""
    length = pad or int(batch.texts.mask.sum(1).max())
    more = length - batch.texts.ids.shape[1]
    ids, mask = F.pad(batch.texts.ids, (0, more)), F.pad(batch.texts.mask, (0, more))
    if batch.masked is None:
        return Given(images, ids, mask.long())
    labels = torch.full_like(batch.texts.ids.flatten(), -100)
    labels[batch.masked.positions] = batch.masked.labels
    labels = F.pad(labels.view_as(batch.texts.ids), (0, more), value=-100)
    return Given(images, ids, mask.long(), F.pad(batch.masked.ids, (0, more)), labels)


def our_step(config: Config) -> Pretraining:
    """Our task with random weights, and a queue that is full, as it is for all of a training but its first steps."""
    task = Pretraining(VisionLanguageModel(config.model), config.objectives).train()
    assert task.teacher is not None
    assert task.teacher.queue is not None
    queue = task.teacher.queue
    for features in (queue.image, queue.text):
        features.copy_(F.normalize(torch.randn_like(features), dim=1))
    queue.ids.fill_(-1)
    queue.pushed.fill_(queue.size)
    return task


def reference_step(config: Config) -> ReferenceStep:
    """The reference with random weights."""
    objectives = config.objectives
    kind = STEPS["albef" if objectives.masked_language > 0 else "blip"]
    return kind(config.model, vit_shape(config.model), objectives.queue, objectives.momentum, objectives.alpha).train()


@dataclass(frozen=True)
class Comparison:
    """losses: of two steps, by objective, ours and the reference's. flops: of the first, a pair, forward and backward, ours and the reference's."""

    losses: list[dict[str, tuple[float, float]]]
    flops: tuple[float, float]

    @property
    def difference(self) -> float:
        """The largest, relative to the loss."""
        return max(abs(a - b) / abs(b) for step in self.losses for a, b in step.values())


def compare(
    step: str, pairs: int, pad: int, device: torch.device, tiny: bool = False, dtype: torch.dtype = torch.float32
) -> Comparison:
    """Both on the same weights, words, negatives and queue, without dropout; the second step sees the first one's gradients, teacher and queue."""
    torch.manual_seed(0)
    config = settings(step, tiny, dropout=False)
    task, reference = our_step(config), reference_step(config)
    assert task.teacher is not None
    for model in (task.model, task.teacher.model):
        _enliven(model)
    task, reference = task.to(device, dtype), reference.to(device, dtype)
    _load(reference, task)
    task.teacher.update(task.model)  # the reference averages before its first forward pass
    rows = torch.arange(pairs, device=device)
    negatives = (rows + 1) % pairs, (rows + pairs // 2) % pairs
    losses: list[dict[str, tuple[float, float]]] = []
    work: list[float] = []
    for seed in range(2):
        batch = draw_batch(config, pairs, seed).to(device)
        given = as_published(batch, task.model.image_encoder.normalize(batch.images), pad)
        given = replace(given, negatives=negatives)
        with _counted(work), _drawn(*negatives):
            ours = {name: loss.sum / loss.count for name, loss in task(batch).items()}
            torch.stack(list(ours.values())).sum().backward()
        with _counted(work):
            theirs = reference(given)
            torch.stack(list(theirs.values())).sum().backward()
        losses.append({name: (float(ours[name].detach()), float(theirs[name].detach())) for name in ours})
        _descend(task.model)
        _descend(reference)
        task.after_step()
    return Comparison(losses, (work[0] / pairs, work[1] / pairs))


@contextmanager
def _drawn(images: Tensor, texts: Tensor) -> Iterator[None]:
    """Our matching objective finds these negatives: it draws texts first, then images."""
    with patch("vlm.objectives.matching.sample_negatives", side_effect=[texts, images]):
        yield


@contextmanager
def _counted(into: list[float]) -> Iterator[None]:
    """Adds the floating-point operations of what runs inside, 2 a multiply-add; attention by its definition, without what kernels recompute."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        yield
    into.append(float(counter.get_total_flops()))


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    """Random weights as large as trained ones: as models start, their output hardly depends on the image."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1.4 * parameter[0].numel() ** -0.5)
        elif parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@torch.no_grad()
def _descend(module: nn.Module, rate: float = 0.01) -> None:
    """A step of plain gradient descent."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter -= rate * parameter.grad
            parameter.grad = None


def _load(reference: ReferenceStep, task: Pretraining) -> None:
    """Our weights into the reference, and the queue."""
    model, teacher = task.model, task.teacher
    assert teacher is not None
    assert teacher.queue is not None
    assert model.matching_head is not None
    _load_encoders(reference.student, model)
    _load_encoders(reference.teacher, teacher.model)
    reference.itm_head.load_state_dict(model.matching_head.state_dict())
    reference.temp.data.copy_(model.temperature)
    reference.image_queue.copy_(teacher.queue.image[:-1].T)
    reference.text_queue.copy_(teacher.queue.text[:-1].T)
    if isinstance(reference, BlipStep):
        weights = _text_weights(model, model.language_head, causal=True)
        reference.decoder.load_state_dict(to_bert_state_dict(weights))


def _load_encoders(encoders: Encoders, model: VisionLanguageModel) -> None:
    """Under transformers' names; the converters' tables say which."""
    assert model.image_projection is not None
    assert model.text_projection is not None
    encoders.vision_proj.load_state_dict(model.image_projection.state_dict())
    encoders.text_proj.load_state_dict(model.text_projection.state_dict())
    backbone = model.image_encoder.backbone
    modules = dict(VISION)
    for n in range(len(backbone.blocks)):
        modules |= {f"encoder.layers.{n}.{there}": f"blocks.{n}.{ours}" for there, ours in VISION_LAYER.items()}
    names = {f"{there}.{kind}": f"{ours}.{kind}" for there, ours in modules.items() for kind in ("weight", "bias")}
    state = backbone.state_dict()
    encoders.vision.load_state_dict({there: state[ours] for there, ours in (names | VISION_PARAMETERS).items()})
    head = model.masked_language_head if hasattr(encoders.text, "cls") else None
    encoders.text.load_state_dict(to_bert_state_dict(_text_weights(model, head), "bert."))


def _text_weights(model: VisionLanguageModel, head: VocabularyHead | None, causal: bool = False) -> TextWeights:
    """Our text Transformer's. causal: with the decoder's self-attention in place of the encoder's."""
    state = model.text.state_dict()
    own = {name.replace(".causal_", "."): tensor for name, tensor in state.items() if ".causal_" in name}
    plain = {name: tensor for name, tensor in state.items() if ".causal_" not in name}
    memory = dict(model.fusion_memory.state_dict())
    return TextWeights(plain | (own if causal else {}), memory, dict(head.state_dict()) if head is not None else {})
