"""What an objective is: it asks for passes through the model, then turns their outputs into a sum and a count.

The two steps let a task join the passes of all objectives into one `fuse` and one `decode`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from vlm.data.batch import Batch
from vlm.model.attention import CrossMemory
from vlm.model.vision_language import ImageFeatures, TextFeatures, VisionLanguageModel


@dataclass(frozen=True)
class Features:
    """What is computed once a step and read by every objective. memory: of the images, by stack. texts: the views of the texts."""

    image: ImageFeatures
    texts: dict[str, TextFeatures]
    memory: dict[str, CrossMemory]


@dataclass(frozen=True)
class Pass:
    """A pass through the fusion layers (or, causal, the decoder). text_rows, memory_rows: (R,) rows of the view and of the images' memory."""

    text_rows: Tensor
    memory_rows: Tensor
    view: Literal["plain", "masked"] = "plain"
    causal: bool = False


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


def exact(tensor: Tensor) -> Tensor:
    """In fp32, or fp64 where the model computes in it: what a softmax and its sum are taken of."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
