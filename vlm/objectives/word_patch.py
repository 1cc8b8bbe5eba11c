"""Word-patch alignment (Chen et al. 2020, UNITER; Kim et al. 2021, ViLT section 3.2): the cost of carrying a text's words to the image's patches.

The plan of that transport comes from IPOT, a proximal point method (Xie et al. 2020).

Letters: B images, T texts, C texts that may lend their image, L tokens, P patches, D width of the text states.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.matching import eligibility
from vlm.objectives.objective import Features, Loss, Pass, exact
from vlm.objectives.pairs import gather, rank, world


class WordPatch(nn.Module):
    """The transport's cost between a text and its image, minus that between the text and another image of the batch (as ViLT's code has it).

    Words are the text's states before they are fused with the image: fused ones hold what they took from the image and would be near any patch.
    projection: image tokens to their width D. negatives: local, other images of this rank's batch; joined, of all ranks', whose patches are exchanged
    with their gradients.
    """

    scope: Literal["pair", "micro"] = "micro"

    def __init__(self, image_dim: int, text_dim: int, negatives: Literal["local", "joined"] = "local") -> None:
        super().__init__()
        self.negatives = negatives
        self.projection = nn.Linear(image_dim, text_dim)
        nn.init.normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)

    @property
    def _joined(self) -> bool:
        return self.negatives == "joined" and world() > 1

    def count(self, batch: Batch) -> Tensor:
        """Two pairs for each text with weight and words, where another image is at hand."""
        return 2 * _counted(batch, *eligibility(batch, self._joined)).sum()

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:  # noqa: ARG002
        """None: the states and tokens are there."""
        return ()

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:  # noqa: ARG002
        """Costs of own pairs minus those of strangers, summed, in fp32 (or better)."""
        text, own = features.texts["plain"], batch.texts.image
        assert text.states is not None
        usable, eligible = eligibility(batch, self._joined)
        counted = _counted(batch, usable, eligible)
        patches = self.projection(features.image.tokens[:, model.image_encoder.prefix :])
        first = rank() * len(own) if self._joined else 0
        strange = next_other(eligible, first)
        with torch.autocast(own.device.type, enabled=False):
            states = F.normalize(exact(text.states), dim=2, eps=1e-5)
            patches = F.normalize(exact(patches), dim=2, eps=1e-5)
            everyone, whose = patches, own
            if self._joined:
                everyone, whose = gather(patches), gather(own + rank() * len(batch))
            compared = torch.cat(
                [patches.index_select(0, own), everyone.index_select(0, whose.index_select(0, strange))]
            )
            cost = 1 - states.repeat(2, 1, 1) @ compared.transpose(1, 2)
            plan = transport(cost, words(batch).repeat(2, 1))
            own_costs, strange_costs = (cost * plan).sum((1, 2)).chunk(2)
        total = torch.where(counted, own_costs - strange_costs, 0.0).sum()
        count = counted.sum()
        return Loss(total, 2 * count, {"cost": (torch.where(counted, own_costs.detach(), 0.0).sum(), count)})


def words(batch: Batch) -> Tensor:
    """(T, L) bool: tokens behind the prompt, the first and the last token left out."""
    texts = batch.texts
    position = torch.arange(texts.ids.shape[1], device=texts.ids.device)
    followed = F.pad(texts.mask[:, 1:], (0, 1), value=False)
    return texts.mask & followed & (position >= texts.prompt[:, None])


def next_other(eligible: Tensor, first: int = 0) -> Tensor:
    """(T,) for each text the next one, in a circle, that is eligible as a stranger; any where none is.

    eligible: (T, C) bool, C: T, or the texts of all ranks. first: which of the C this rank's first text is.
    """
    texts, columns = eligible.shape
    rows = first + torch.arange(texts, device=eligible.device)
    ahead = (torch.arange(columns, device=eligible.device)[None, :] - rows[:, None]) % columns
    return ahead.masked_fill(~eligible, columns).argmin(1)


@torch.no_grad()
def transport(cost: Tensor, rows: Tensor, beta: float = 0.5, iterations: int = 50) -> Tensor:
    """The plan (N, L, P) that carries equal parts from the rows that take part to all columns at the least cost, nearly: rows sum to 1 / their
    number, column sums and cost come closer with each iteration. Without gradient: at the optimum the plan is the gradient of the distance.

    cost: (N, L, P). rows: (N, L) bool; where there is none the plan is 0. beta: weight of the proximal step; it and the iterations are ViLT's.
    """
    kernel = (-cost / beta).exp() * rows[..., None]
    plan = torch.ones_like(kernel)
    share = rows / rows.sum(1, keepdim=True).clamp(min=1).to(cost.dtype)  # (N, L)
    columns, tiny = cost.shape[2], torch.finfo(cost.dtype).tiny
    left = share
    for _ in range(iterations):
        step = kernel * plan
        right = 1 / columns / (left[:, None] @ step).squeeze(1).clamp(min=tiny)
        left = share / (step @ right[..., None]).squeeze(2).clamp(min=tiny)
        plan = left[..., None] * step * right[:, None]
    return plan


def _counted(batch: Batch, usable: Tensor, eligible: Tensor) -> Tensor:
    """(T,) bool: texts that take part, have words and a stranger."""
    return usable & eligible.any(1) & words(batch).any(1)
