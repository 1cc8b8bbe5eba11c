"""Pair losses of a batch that is encoded in parts, with the gradients of the whole (GradCache; Gao et al. 2021, section 3).

The first pass encodes every part and keeps its embeddings alone. They are compared as one batch, which gives the loss and its gradient with respect
to every embedding. The second pass encodes each part again, as before: (embedding * gradient).sum() has, by the chain rule, the loss's gradient with
respect to the weights. Only one part's activations are ever held.

Letters: T texts of a part, E width of the embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Loss, PairObjective, Taught
from vlm.objectives.pairs import Pairs


@dataclass(frozen=True)
class Embedded:
    """What the first pass keeps of a part: its pairs without gradient, and what a teacher says of them."""

    own: Pairs
    taught: Taught | None = None


@dataclass(frozen=True)
class CachedLoss:
    """What the whole batch's loss comes to for one part.

    value: detached. image, text: (T, E), the gradients with respect to the part's embeddings. parameters: those with respect to what the loss itself
    reads, such as the temperature. The first part has value and parameters for all of them.
    """

    value: Loss
    image: Tensor
    text: Tensor
    parameters: Sequence[tuple[nn.Parameter, Tensor]] = ()

    def loss(self, own: Pairs) -> Loss:
        """The value, with the gradients behind it. own: the part's pairs in the second pass."""
        pull = (own.image * self.image).sum() + (own.text * self.text).sum()
        for parameter, gradient in self.parameters:
            pull = pull + (parameter * gradient).sum()
        return Loss(self.value.sum + (pull - pull.detach()), self.value.count, self.value.scalars)


def cached_losses(
    model: VisionLanguageModel, objectives: Mapping[str, PairObjective], parts: Sequence[Embedded]
) -> list[dict[str, CachedLoss]]:
    """For each part, by objective, what the batch of all parts gives. To be called outside autocast, for the backward pass is made here."""
    own, taught = _joined(parts)
    own = own._replace(image=own.image.requires_grad_(), text=own.text.requires_grad_())
    sizes = [len(part.own.ids) for part in parts]
    found: list[dict[str, CachedLoss]] = [{} for _ in parts]
    for name, objective in objectives.items():
        loss = objective.compare(model, own, taught)
        read = [model.temperature, *(objective.parameters() if isinstance(objective, nn.Module) else ())]
        trained = [parameter for parameter in read if parameter.requires_grad]
        image, text, *rest = torch.autograd.grad(loss.sum, [own.image, own.text, *trained], materialize_grads=True)
        value, counted = Loss(loss.sum.detach(), loss.count, loss.scalars), tuple(zip(trained, rest, strict=True))
        for part, gradients in zip(found, zip(image.split(sizes), text.split(sizes), strict=True), strict=True):
            part[name] = CachedLoss(value, *gradients, counted)
            value, counted = Loss(torch.zeros_like(value.sum), torch.zeros_like(value.count)), ()
    return found


def _joined(parts: Sequence[Embedded]) -> tuple[Pairs, Taught | None]:
    """All parts as one batch. A teacher's keys: its features of every part, then its queue, which each part names anew."""
    own, said = _cat([part.own for part in parts]), [part.taught for part in parts if part.taught is not None]
    if not said:
        return own, None
    keys = [_cat([taught.keys[0] for taught in said]), *said[0].keys[1:]]
    return own, Taught(said[0].alpha, _cat([taught.pairs for taught in said if taught.pairs is not None]), keys, None)


def _cat(blocks: Sequence[Pairs]) -> Pairs:
    return Pairs(*(torch.cat(column) for column in zip(*blocks, strict=True)))
