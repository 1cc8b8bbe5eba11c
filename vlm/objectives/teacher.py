"""The momentum teacher (Li et al. 2021, ALBEF section 3.3; Li et al. 2022, BLIP): an exponential average of the model that gives the contrastive
objective its keys, and contrastive and masked language modelling soft targets.

Letters: B images, T texts, L tokens, M hidden tokens, V vocabulary, K slots of the queue.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.model.vision_language import ImageFeatures, TextFeatures, VisionLanguageModel
from vlm.objectives.objective import Taught
from vlm.objectives.pairs import Pairs, pairs
from vlm.objectives.queue import FeatureQueue


class Teacher(nn.Module):
    """An average of `model`, always in evaluation mode and without gradients, with a queue of its features.

    momentum: share of itself that it keeps at each step. queue: K, 0 for none. alpha: weight of its soft targets, reached linearly over `ramp`
    epochs. keys: joined, every rank's momentum features and the queue; local, this rank's and the queue (as published). compares: whether its
    embeddings are wanted. predicts: whether its logits of hidden tokens are.
    """

    steps: Tensor

    def __init__(
        self,
        model: VisionLanguageModel,
        momentum: float = 0.995,
        queue: int = 0,
        alpha: float = 0.4,
        ramp: float = 1.0,
        keys: Literal["joined", "local"] = "joined",
        compares: bool = True,
        predicts: bool = True,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.momentum, self.alpha, self.ramp, self.keys = momentum, alpha, ramp, keys
        self.compares, self.predicts = compares, predicts
        dtype = torch.float64 if model.temperature.dtype == torch.float64 else torch.float32
        self.queue = FeatureQueue(queue, model.config.embed_dim, dtype) if queue else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.ramp_steps = 0.0
        self._waiting: list[Pairs] = []
        self.train()

    def train(self, mode: bool = True) -> "Teacher":  # noqa: ARG002
        """It has one mode, evaluation: no dropout, stored batch-norm statistics."""
        return super().train(False)

    def prepare(self, epoch_steps: int) -> None:
        """Once, before training: how many optimizer steps an epoch has."""
        self.ramp_steps = self.ramp * epoch_steps

    @property
    def weight(self) -> Tensor:
        """() alpha at the present step, on the device."""
        if self.ramp_steps == 0:
            return torch.full_like(self.steps, self.alpha, dtype=self.model.temperature.dtype)
        progress = (self.steps.to(self.model.temperature.dtype) / self.ramp_steps).clamp(max=1)
        return self.alpha * progress

    @torch.no_grad()
    def forward(
        self, image: ImageFeatures, batch: Batch, learning: bool = True, compares: bool = True, predicts: bool = True
    ) -> Taught:
        """What it says of a batch whose images it has encoded.

        learning: its features will enter the queue after the step. compares, predicts: whether these parts of it are wanted now.
        """
        own: Pairs | None = None
        keys: list[Pairs] = []
        texts = batch.texts
        if self.compares and compares:
            own = pairs(image.embedding, self.model.encode_text(texts.ids, texts.mask).embedding, batch)
            waits = learning and self.queue is not None
            everyone = own.gathered() if waits or self.keys == "joined" else own
            keys = [everyone if self.keys == "joined" else own]
            if self.queue is not None:
                keys.append(self.queue.pairs())
            if waits:
                self._waiting.append(everyone)
        words = self._words(image, batch) if self.predicts and predicts else None
        return Taught(self.weight, own, keys, words)

    def _words(self, image: ImageFeatures, batch: Batch) -> Tensor:
        """(M, V) logits of the hidden tokens."""
        masked, texts = batch.masked, batch.texts
        if masked is None:
            raise ValueError("the batch has no masked texts, of which the teacher is to say what is hidden.")
        view: TextFeatures = self.model.text_view(masked.ids, texts.mask)
        memory = self.model.memory(image.tokens, None, "fusion").select(texts.image)
        states = self.model.fuse(view, memory).flatten(0, 1).index_select(0, masked.positions)
        return self.model.masked_language_logits(states)

    @torch.no_grad()
    def update(self, model: VisionLanguageModel, taken: Tensor | None = None) -> None:
        """After each optimizer step, which is before its next forward pass: weights averaged, buffers copied, the queue moved on; nothing of it where
        the step was not `taken`, a () bool on the device.

        The queue waits until here because the backward pass still needs what it held.
        """
        taken = torch.ones_like(self.steps, dtype=torch.bool) if taken is None else taken
        own, theirs = dict(self.model.named_parameters()), dict(model.named_parameters())
        weight = (1 - self.momentum) * taken.double()
        weights = {dtype: weight.to(dtype) for dtype in {parameter.dtype for parameter in own.values()}}
        torch._foreach_lerp_(
            list(own.values()), [theirs[name] for name in own], [weights[parameter.dtype] for parameter in own.values()]
        )
        # a skipped step leaves the model's buffers as they were too
        buffers = dict(model.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        for new in self._waiting:
            assert self.queue is not None
            self.queue.push(new._replace(valid=new.valid & taken))
        self._waiting.clear()
        self.steps += taken
