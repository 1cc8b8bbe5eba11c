"""R-Drop (Liang et al. 2021): two passes that differ by dropout are to say the same. Letters: N predicted tokens, V vocabulary."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.around import Around, Words
from vlm.objectives.captioning import Predictions
from vlm.objectives.objective import Features, Loss, Pass


class Consistency(Around):
    """The mean of both passes' losses, and alpha / 4 times the divergence of each from the other.

    That is half of what Liang et al. write (the sum of both losses, and alpha / 2 times the divergences), so that the loss stays as large as that
    of one pass, and alpha means the same. The image is encoded once: the passes are the decoder's, beside each other in one batch.
    """

    def __init__(self, inner: Words, alpha: float) -> None:
        super().__init__(inner)
        self.alpha = alpha

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:
        """Every pass twice."""
        return [wanted for wanted in self.inner.requests(model, features, batch) for _ in range(2)]

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:
        """Of both passes together."""
        if not outputs:
            return self.inner.loss(model, outputs, features, batch)
        one, two = (self.predictions(model, output, batch) for output in outputs)
        first, second = (self.inner.judge(model, found, features, batch) for found in (one, two))
        apart = symmetric_divergence(one, two)
        scalars = {
            name: (a + second.scalars[name][0], n + second.scalars[name][1]) for name, (a, n) in first.scalars.items()
        }
        total = (first.sum + second.sum) / 2 + self.alpha / 4 * apart
        return Loss(total, first.count, scalars | {"divergence": (apart.detach() / 2, one.weight.sum())})


def symmetric_divergence(one: Predictions, two: Predictions) -> Tensor:
    """KL(one || two) + KL(two || one), weighted and summed over the labels. Both learn from it."""
    p, q = (torch.log_softmax(found.logits, dim=1) for found in (one, two))
    apart = F.kl_div(q, p, reduction="none", log_target=True) + F.kl_div(p, q, reduction="none", log_target=True)
    return (apart.sum(1) * one.weight).sum()
