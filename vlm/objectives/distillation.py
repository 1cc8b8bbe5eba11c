"""Learning from a larger model beside the data (Hinton et al. 2015; of features: Romero et al. 2015).

Letters: B images, T texts, L tokens, N predicted tokens, V vocabulary, D width of the student's states, E of the teacher's.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.model.attention import initialise
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.around import Around, Words
from vlm.objectives.captioning import Predictions
from vlm.objectives.objective import Features, Loss, exact


class Distillation(Around):
    """Adds to the loss, at every label, how far the student is from the teacher.

    logits: weight of T^2 KL(teacher || student), both at temperature T. features: weight of the squared distance (the mean over the width) of the
    decoder's last states, the student's through `projection` where widths differ. The teacher stays in evaluation mode and is no part of this
    module's state.
    """

    def __init__(
        self,
        inner: Words,
        teacher: VisionLanguageModel,
        width: int,
        logits: float = 1.0,
        features: float = 0.0,
        temperature: float = 2.0,
    ) -> None:
        """width: D."""
        super().__init__(inner)
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple: neither saved nor trained with the rest
        self.logits, self.features, self.temperature = logits, features, temperature
        own = teacher.config.text.dim
        self.projection = nn.Linear(width, own) if features and width != own else None
        if self.projection is not None:
            initialise(self.projection)
        self._said: tuple[Batch, Predictions] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The teacher moves to the device with the rest."""
        self._teacher[0]._apply(fn)
        moved: Any = super()._apply(fn, recurse)
        return moved  # type: ignore[no-any-return]

    def judge(self, model: VisionLanguageModel, found: Predictions, features: Features, batch: Batch) -> Loss:
        """The inner judgement, and the distances."""
        base = self.inner.judge(model, found, features, batch)
        taught = self._taught(features, batch)
        total, scalars, weight = base.sum, dict(base.scalars), found.weight
        if self.logits:
            t = self.temperature
            student, teacher = torch.log_softmax(found.logits / t, dim=1), torch.log_softmax(taught.logits / t, dim=1)
            apart = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * t**2
            total = total + self.logits * (apart * weight).sum()
            scalars["teacher_logits"] = ((apart.detach() * weight).sum(), weight.sum())
        if self.features:
            states = found.states if self.projection is None else self.projection(found.states)
            apart = (exact(states) - exact(taught.states)).square().mean(1)
            total = total + self.features * (apart * weight).sum()
            scalars["teacher_features"] = ((apart.detach() * weight).sum(), weight.sum())
        return Loss(total, base.count, scalars)

    @torch.no_grad()
    def _taught(self, features: Features, batch: Batch) -> Predictions:
        """What the teacher says of the batch, once however often it is asked."""
        if self._said is None or self._said[0] is not batch:
            teacher = self._teacher[0]
            (wanted,) = self.inner.requests(teacher, features, batch)
            tokens = teacher.encode_image(_sized(batch.images, teacher.image_encoder.image_size)).tokens
            memory = teacher.memory(tokens, None, "decoder").select(wanted.memory_rows)
            states = teacher.decode_states(batch.texts.ids[wanted.text_rows], memory)
            self._said = batch, self.inner.predictions(teacher, states, batch)
        return self._said[1]


def _sized(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) uint8 as the teacher takes them, (B, 3, size, size)."""
    if images.shape[2] == size and images.shape[3] == size:
        return images
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return resized.clamp(0, 255).round().to(torch.uint8)
