"""Pretraining with any of the family's objectives; evaluated by zero-shot retrieval from embeddings."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm.config import ObjectivesConfig
from vlm.data.batch import Batch
from vlm.errors import ConfigError
from vlm.metrics.interval import bootstrap
from vlm.metrics.retrieval import RetrievalScores, retrieval_scores
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.captioning import Captioning
from vlm.objectives.contrastive import Contrastive
from vlm.objectives.masked_language import MaskedLanguage
from vlm.objectives.matching import Matching
from vlm.objectives.objective import Features, Loss, Objective
from vlm.objectives.pairs import largest
from vlm.objectives.self_critical import SelfCritical
from vlm.objectives.sigmoid import SigmoidContrastive
from vlm.objectives.teacher import Teacher
from vlm.tasks.task import Record, Task


def build_objectives(
    config: ObjectivesConfig, self_critical: SelfCritical | None = None
) -> tuple[dict[str, Objective], dict[str, float]]:
    """The objectives whose weight is above 0, and their weights. self_critical: where that one is among them.

    Raises:
        ConfigError: all weights are 0.
    """
    known: dict[str, Objective] = {
        "contrastive": SigmoidContrastive() if config.contrastive_loss == "sigmoid" else Contrastive(),
        "matching": Matching(config.negatives),
        "masked_language": MaskedLanguage(),
        "captioning": Captioning(config.label_smoothing),
    }
    if self_critical is not None:
        known["self_critical"] = self_critical
    weights = {name: float(getattr(config, name)) for name in known if getattr(config, name) > 0}
    if not weights:
        raise ConfigError(
            "objectives: all weights are 0; give at least one of contrastive, matching, masked_language, captioning, self_critical."
        )
    return {name: known[name] for name in weights}, weights


def build_teacher(model: VisionLanguageModel, config: ObjectivesConfig) -> Teacher | None:
    """The momentum teacher, a copy of `model` as it is now, where the settings ask for one."""
    if config.momentum == 0:
        return None
    return Teacher(
        model,
        config.momentum,
        config.queue,
        config.alpha,
        config.alpha_ramp,
        config.keys,
        compares=config.contrastive > 0 and config.contrastive_loss == "softmax",
        predicts=config.masked_language > 0,
    )


class Pretraining(Task):
    """Contrastive, matching, masked language modelling and captioning, each with its weight."""

    metric = "mean_R@1"

    def __init__(
        self, model: VisionLanguageModel, config: ObjectivesConfig, self_critical: SelfCritical | None = None
    ) -> None:
        super().__init__(model, *build_objectives(config, self_critical))
        self.teacher = build_teacher(model, config)
        self.exchanges_texts = config.matching > 0 and config.negatives == "joined"
        self.compares = self.exchanges_texts or config.contrastive > 0

    def forward(self, batch: Batch) -> dict[str, Loss]:
        """The losses of one micro-batch."""
        return super().forward(self._evened(batch))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What each loss will be divided by."""
        return super().counts(self._evened(batch))

    def _evened(self, batch: Batch) -> Batch:
        """As many texts on every rank where ranks compare them (images differ in their number of captions), as long where they exchange them."""
        if self.compares:
            batch = batch.filled_up(largest(len(batch.texts.ids)))
        if self.exchanges_texts:
            batch = batch.lengthened(largest(batch.texts.ids.shape[1]), self.model.config.text.pad_id)
        return batch

    def features(self, batch: Batch) -> Features:
        """What the objectives share, and what the teacher says."""
        features = super().features(batch)
        if self.teacher is None:
            return features
        with torch.no_grad():
            image = self.encode_image(batch.images, self.teacher.model)
        return replace(features, teacher=self.teacher(image, batch, learning=self.training))

    def prepare(self, epoch_steps: int) -> None:
        if self.teacher is not None:
            self.teacher.prepare(epoch_steps)

    def after_step(self) -> None:
        """The temperature is clamped before the teacher averages it."""
        super().after_step()
        if self.teacher is not None:
            self.teacher.update(self.model)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Record]:
        """One record an image: its embedding (E,) and those of its texts (n, E)."""
        image = self.encode_image(batch.images).embedding.cpu().numpy()
        text = self.model.encode_text(batch.texts.ids, batch.texts.mask).embedding
        assert text is not None
        rows, texts = batch.texts.image.cpu().numpy(), text.cpu().numpy()
        return [
            {"key": key, "image_id": int(batch.image_ids[i]), "image": image[i], "texts": texts[rows == i]}
            for i, key in enumerate(batch.keys)
        ]

    def evaluate(self, records: Iterable[Record]) -> dict[str, float]:
        """Recall in percent, text retrieved for an image (TR) and image for a text (IR), over the records at hand."""
        records = list(records)
        found, _ = _retrieve(records)
        to_text = {f"TR_R@{k}": value for k, value in found.image_to_text.items()}
        to_image = {f"IR_R@{k}": value for k, value in found.text_to_image.items()}
        mean = (to_text["TR_R@1"] + to_image["IR_R@1"]) / 2
        return {**to_text, **to_image, "mean_R@1": mean, "images": float(len(records))}

    def intervals(self, records: Sequence[Record]) -> dict[str, tuple[float, float]]:
        """Those of R@1, among the same candidates; an image is drawn with all its texts."""
        found, owner = _retrieve(records)
        return {
            "TR_R@1": bootstrap((100.0 * (found.image_ranks < 1)).tolist()),
            "IR_R@1": bootstrap((100.0 * (found.text_ranks < 1)).tolist(), owner.tolist()),
        }


def _retrieve(records: Sequence[Record]) -> tuple[RetrievalScores, NDArray]:
    """The scores over the records at hand, and each text's image."""
    images = np.stack([r["image"] for r in records])
    texts = np.concatenate([r["texts"] for r in records])
    owner = np.repeat(np.arange(len(records)), [len(r["texts"]) for r in records])
    return retrieval_scores(images @ texts.T, np.arange(len(records)), owner), owner
