"""What an objective is: it asks for passes through the model, then turns their outputs into a sum and a count.

The two steps let a task join the passes of all objectives into one `fuse` and one `decode`.

Letters: B images, T texts, L tokens, D width, M hidden tokens, V vocabulary, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from vlm.data.batch import Batch
from vlm.model.attention import CrossMemory
from vlm.model.vision_language import ImageFeatures, TextFeatures, VisionLanguageModel
from vlm.objectives.pairs import Pairs


@dataclass(frozen=True)
class Taught:
    """What a momentum teacher says of a batch, without gradient.

    alpha: (), the present weight of its soft targets. pairs: its embeddings of this rank's pairs. keys: the columns that they and the model's are
    compared with, in blocks: the batch's, then the queue's. words: (M, V) its logits of the hidden tokens. pairs is None, keys empty, words None
    where not wanted.
    """

    alpha: Tensor
    pairs: Pairs | None
    keys: Sequence[Pairs]
    words: Tensor | None


@dataclass(frozen=True)
class Features:
    """What is computed once a step and read by every objective. memory: of the images, by stack. texts: the views of the texts."""

    image: ImageFeatures
    texts: dict[str, TextFeatures]
    memory: dict[str, CrossMemory]
    teacher: Taught | None = None


@dataclass(frozen=True)
class Pass:
    """A pass through the fusion layers (or, causal, the decoder). text_rows, memory_rows: (R,) rows of the view and of the images' memory.

    text, memory: in place of these, texts and images of other ranks.
    """

    text_rows: Tensor
    memory_rows: Tensor
    view: Literal["plain", "masked"] = "plain"
    causal: bool = False
    text: TextFeatures | None = None
    memory: CrossMemory | None = None


@dataclass(frozen=True)
class Loss:
    """sum: differentiable, over the batch. count: what it is to be divided by, after both were added up over micro-batches and ranks.

    scalars: detached (sum, count) pairs for the log.
    """

    sum: Tensor
    count: Tensor
    scalars: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective(Protocol):
    """`scope` pair: it needs the embeddings of the whole batch; micro: any part of a batch will do."""

    scope: Literal["pair", "micro"]

    def count(self, batch: Batch) -> Tensor:
        """The loss's count, from the batch alone, so that it is known before the first backward pass of an accumulated step."""
        ...

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:
        """The passes wanted."""
        ...

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:
        """The loss from the passes' outputs, each (R, L, D), in the order asked for."""
        ...


class PairObjective(Objective, Protocol):
    """One of scope pair: its `loss` is `compare` of the batch's own pairs."""

    def compare(self, model: VisionLanguageModel, own: Pairs, taught: Taught | None) -> Loss:
        """The loss of this rank's pairs, from one batch or from all its micro-batches."""
        ...


def exact(tensor: Tensor) -> Tensor:
    """In fp32, or fp64 where the model computes in it: what a softmax and its sum are taken of."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
