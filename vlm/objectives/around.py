"""What may be laid around an objective of words in fine-tuning: see `consistency`, `adversarial`, `distillation`. They lie around each other too."""

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.captioning import Predictions
from vlm.objectives.objective import Features, Loss, Objective, Pass


class Words(Objective, Protocol):
    """An objective whose loss is a judgement of what a pass predicts at each label."""

    def predictions(self, model: VisionLanguageModel, output: Tensor, batch: Batch) -> Predictions:
        """Of a pass as requested, (R, L, D)."""
        ...

    def judge(self, model: VisionLanguageModel, found: Predictions, features: Features, batch: Batch) -> Loss:
        """The loss of one pass's predictions."""
        ...


class Around(nn.Module):
    """As `inner`, where nothing is changed."""

    scope: Literal["pair", "micro"] = "micro"

    def __init__(self, inner: Words) -> None:
        super().__init__()
        self.inner: Words = inner

    def count(self, batch: Batch) -> Tensor:
        """Of `inner`."""
        return self.inner.count(batch)

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:
        """Of `inner`."""
        return self.inner.requests(model, features, batch)

    def predictions(self, model: VisionLanguageModel, output: Tensor, batch: Batch) -> Predictions:
        """Of `inner`."""
        return self.inner.predictions(model, output, batch)

    def judge(self, model: VisionLanguageModel, found: Predictions, features: Features, batch: Batch) -> Loss:
        """Of `inner`."""
        return self.inner.judge(model, found, features, batch)

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:
        """Of the one pass, or of none where no text is learned."""
        if not outputs:
            return self.inner.loss(model, outputs, features, batch)
        return self.judge(model, self.predictions(model, outputs[0], batch), features, batch)
