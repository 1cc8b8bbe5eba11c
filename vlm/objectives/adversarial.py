"""Adversarial perturbation of embeddings (FreeLB, Zhu et al. 2020; of images and texts: VILLA, Gan et al. 2020).

Letters: B images, P image tokens, T texts, L tokens of a text, D width of the words, E of the image tokens, K steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.around import Around, Words
from vlm.objectives.objective import Features, Loss, Pass


class Shift(NamedTuple):
    """How far something is moved. by: (R, M, W). limit: (R, 1, 1), the length that a row's shift may have at most. step: (R, 1, 1), that of a step.
    where: (R, M, 1), 1 at what is moved.
    """

    by: Tensor
    limit: Tensor
    step: Tensor
    where: Tensor

    @classmethod
    def drawn(cls, states: Tensor, where: Tensor, bound: float, step: float) -> "Shift":
        """A random one of `states` (R, M, W) within the bound, uniform in a cube (FreeLB's start)."""
        states = states.detach().float() if states.dtype != torch.float64 else states.detach()
        where = where[..., None].to(states.dtype)
        length = (states * where).norm(dim=(1, 2), keepdim=True)
        count = where.sum(dim=(1, 2), keepdim=True) * states.shape[2]
        cube = (torch.rand_like(states) * 2 - 1) * bound * length / count.clamp(min=1).sqrt()
        return cls((cube * where).requires_grad_(), bound * length, step * length, where)

    def climbed(self, gradient: Tensor) -> "Shift":
        """A step along the gradient's direction, and back into the bound."""
        gradient = gradient * self.where
        norm = gradient.norm(dim=(1, 2), keepdim=True)
        by = self.by.detach() + self.step * gradient / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        length = by.norm(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(norm.dtype).tiny)
        return self._replace(by=(by * (self.limit / length).clamp(max=1)).requires_grad_())


class Adversarial(Around):
    """The mean of the losses at K places, from a random one on, each a step of ascent from the one before: FreeLB's gradient, 1 / K of each place's.

    Moved are the words' embeddings and the image's tokens, which are encoded once. As lengths differ between models and between the two, step and
    bound are shares of the length of what is moved, where the authors give lengths. Dropout falls alike at all places, as FreeLB wants it.
    """

    def __init__(self, inner: Words, steps: int, step_size: float, bound: float) -> None:
        super().__init__(inner)
        self.steps, self.step_size, self.bound = steps, step_size, bound

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:  # noqa: ARG002
        """None: a pass is known when the one before it is."""
        return ()

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:
        """Runs the decoder at every place."""
        passes = self.inner.requests(model, features, batch)
        if not passes:
            return self.inner.loss(model, outputs, features, batch)
        words, image = self._start(model, features, batch)
        seed = int(torch.randint(2**62, ()))
        total: Tensor | None = None
        for place in range(self.steps):
            torch.manual_seed(seed)
            found = self.inner.loss(model, _decoded(model, passes, words, image, features, batch), features, batch)
            total = found.sum if total is None else total + found.sum
            if place + 1 < self.steps:
                gradients = torch.autograd.grad(found.sum, (words.by, image.by), retain_graph=True)
                words, image = words.climbed(gradients[0]), image.climbed(gradients[1])
        assert total is not None
        return Loss(total / self.steps, found.count, found.scalars)

    def _start(self, model: VisionLanguageModel, features: Features, batch: Batch) -> tuple[Shift, Shift]:
        """Random shifts of the words (T, L, D) and of the image tokens (B, P, E)."""
        stack, texts, tokens = model.decoder or model.text, batch.texts, features.image.tokens
        words = torch.nn.functional.embedding(texts.ids, stack.word_embedding.detach())
        everywhere = torch.ones_like(tokens[..., 0], dtype=torch.bool)
        return (
            Shift.drawn(words, texts.mask, self.bound, self.step_size),
            Shift.drawn(tokens, everywhere, self.bound, self.step_size),
        )


def _decoded(
    model: VisionLanguageModel, passes: Sequence[Pass], words: Shift, image: Shift, features: Features, batch: Batch
) -> list[Tensor]:
    """The passes' states with words and image moved."""
    memory = model.memory(features.image.tokens + image.by, None, "decoder")
    return [
        model.decode_states(batch.texts.ids[p.text_rows], memory.select(p.memory_rows), shift=words.by[p.text_rows])
        for p in passes
    ]
