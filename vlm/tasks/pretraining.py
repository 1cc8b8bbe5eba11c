"""Pretraining with any of the family's objectives; evaluated by zero-shot retrieval: from embeddings, or, where nothing teaches these, from the
cross-attention of all pairs (METER, Dou et al. 2022; ViLT, Kim et al. 2021).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm.config import ObjectivesConfig, RetrievalConfig
from vlm.data.batch import Batch
from vlm.errors import ConfigError
from vlm.metrics.interval import bootstrap
from vlm.metrics.retrieval import RetrievalScores, retrieval_scores
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.captioning import Captioning
from vlm.objectives.contrastive import Contrastive
from vlm.objectives.masked_image import MaskedImage
from vlm.objectives.masked_language import MaskedLanguage
from vlm.objectives.matching import Matching
from vlm.objectives.objective import Objective, Taught
from vlm.objectives.self_critical import SelfCritical
from vlm.objectives.sigmoid import SigmoidContrastive
from vlm.objectives.teacher import Teacher
from vlm.objectives.word_patch import WordPatch
from vlm.tasks.reranking import By, join_texts, rerank
from vlm.tasks.retrieval import embedded, similarities
from vlm.tasks.task import Record, Task

TEACHES: dict[By, tuple[str, ...]] = {"matching": ("matching",), "captioning": ("captioning", "self_critical")}
"""The objectives that each way of scoring a pair by cross-attention is learned from."""


def build_objectives(
    model: VisionLanguageModel, config: ObjectivesConfig, self_critical: SelfCritical | None = None
) -> tuple[dict[str, Objective], dict[str, float]]:
    """The objectives whose weight is above 0, and their weights. self_critical: where that one is among them.

    Raises:
        ConfigError: all weights are 0, or the model does not suit one.
    """
    encoder, text = model.image_encoder, model.config.text
    known: dict[str, Callable[[], Objective]] = {
        "contrastive": SigmoidContrastive if config.contrastive_loss == "sigmoid" else Contrastive,
        "matching": lambda: Matching(config.negatives, config.easy_negatives),
        "masked_language": MaskedLanguage,
        "masked_image": lambda: MaskedImage(encoder, text if config.masked_image_text else None),
        "word_patch": lambda: WordPatch(encoder.dim, text.dim, config.negatives),
        "captioning": lambda: Captioning(config.label_smoothing, of="captions"),
        "answering": lambda: Captioning(config.label_smoothing, per="texts", of="answers"),
    }
    if self_critical is not None:
        known["self_critical"] = lambda: self_critical
    weights = {name: float(getattr(config, name)) for name in known if getattr(config, name) > 0}
    if not weights and config.self_critical == 0:  # which an evaluation, without training captions, has no use for
        raise ConfigError(
            "objectives: all weights are 0; give at least one of contrastive, matching, masked_language, masked_image, word_patch, captioning, "
            "answering, self_critical."
        )
    return {name: known[name]() for name in weights}, weights


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
    """Contrastive, matching, masked language, masked image, word-patch alignment and captioning, each with its weight.

    Attributes: `all_pairs`, whether evaluation looks at every pair by cross-attention and at no embedding: without the contrastive objective, where
    one is on that teaches what `retrieval.by` names. Where none is, the embeddings stay those that the run started from, and `best` says nothing of
    what it learns: `latest` is its result.
    """

    metric = "mean_R@1"

    def __init__(
        self,
        model: VisionLanguageModel,
        config: ObjectivesConfig,
        self_critical: SelfCritical | None = None,
        retrieval: RetrievalConfig | None = None,
    ) -> None:
        """retrieval: how it is evaluated; if not given by embeddings alone, or all pairs by the matching head."""
        super().__init__(model, *build_objectives(model, config, self_critical))
        self.retrieval = RetrievalConfig() if retrieval is None else retrieval
        taught = any(getattr(config, name) > 0 for name in TEACHES[self.retrieval.by])
        self.all_pairs = config.contrastive == 0 and taught and self.retrieval.rerank == 0
        self._found: tuple[Sequence[Record], Retrieved] | None = None
        self.reads_texts |= config.masked_image > 0 and config.masked_image_text
        self.teacher = build_teacher(model, config)
        self.exchanges_texts = config.matching > 0 and config.negatives == "joined"
        self.compares |= config.negatives == "joined" and (config.matching > 0 or config.word_patch > 0)

    def taught(self, batch: Batch, compares: bool = True, predicts: bool = True) -> Taught | None:
        """What the momentum teacher says."""
        teacher = self.teacher
        if teacher is None or not ((compares and teacher.compares) or (predicts and teacher.predicts)):
            return None
        with torch.no_grad():
            image = self.encode_image(batch.images, teacher.model)
        said: Taught = teacher(image, batch, learning=self.training, compares=compares, predicts=predicts)
        return said

    def prepare(self, epoch_steps: int) -> None:
        for part in (self.teacher, self.objectives.get("matching")):
            if isinstance(part, Teacher | Matching):
                part.prepare(epoch_steps)

    def after_step(self, taken: Tensor | None = None) -> None:
        """The temperature is clamped before the teacher averages it."""
        super().after_step(taken)
        if isinstance(matching := self.objectives.get("matching"), Matching):
            matching.after_step(taken)
        if self.teacher is not None:
            self.teacher.update(self.model, taken)

    def train(self, mode: bool = True) -> Self:
        """As every module's; the records of the last evaluation are let go."""
        self._found = None
        return super().train(mode)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Record]:
        """One record an image: its embedding (E,) and those of its texts (n, E), unless all pairs are looked at; to look at pairs its tokens (P, D),
        in half precision, and the texts' token ids, each with the number of tokens that are not predicted.
        """
        features, texts = self.encode_image(batch.images), batch.texts
        embeddings = [{}] * len(batch) if self.all_pairs else embedded(self.model, features, batch)
        records: list[Record] = [
            {"key": key, "image_id": int(batch.image_ids[i]), **found}
            for i, (key, found) in enumerate(zip(batch.keys, embeddings, strict=True))
        ]
        if self.retrieval.rerank or self.all_pairs:
            owner = texts.image.cpu().numpy()
            tokens = features.tokens.half().cpu().numpy()
            lengths, prompts, ids = texts.mask.sum(1).tolist(), texts.prompt.tolist(), texts.ids.tolist()
            for i, record in enumerate(records):
                record["tokens"] = tokens[i]
                record["ids"] = [(ids[t][: lengths[t]], prompts[t]) for t in np.nonzero(owner == i)[0]]
        return records

    def evaluate(self, records: Iterable[Record]) -> dict[str, float]:
        """Recall in percent, text retrieved for an image (TR) and image for a text (IR), over the records at hand; where pairs are looked at
        again, those of the embeddings alone beside.
        """
        found = self._retrieve(records)
        scores = found.final.named()
        if found.embeddings is not None:
            scores |= {f"embeddings_{name}": value for name, value in found.embeddings.named().items()}
        return {**scores, "images": float(len(found.final.image_ranks))}

    def intervals(self, records: Sequence[Record]) -> dict[str, tuple[float, float]]:
        """Those of R@1, among the same candidates; an image is drawn with all its texts."""
        found = self._retrieve(records)
        return {
            "TR_R@1": bootstrap((100.0 * (found.final.image_ranks < 1)).tolist()),
            "IR_R@1": bootstrap((100.0 * (found.final.text_ranks < 1)).tolist(), found.owner.tolist()),
        }

    def _retrieve(self, records: Iterable[Record]) -> "Retrieved":
        """The scores over the records at hand; kept for the same ones until training goes on, because looking at pairs again takes long."""
        records = records if isinstance(records, Sequence) else list(records)
        if self._found is None or self._found[0] is not records:
            self._found = (records, self._rank(records))
        return self._found[1]

    def _rank(self, records: Sequence[Record]) -> "Retrieved":
        images = np.arange(len(records))
        if self.all_pairs:
            owner = np.repeat(images, [len(r["ids"]) for r in records])
            # Equal similarities add nothing to what cross-attention says; every pair is a candidate.
            looked_at = self._look(records, np.zeros((len(images), len(owner))), len(owner))
            return Retrieved(retrieval_scores(looked_at, images, owner), owner)
        similarity, owner = similarities(records)
        embeddings = retrieval_scores(similarity, images, owner)
        if self.retrieval.rerank == 0:
            return Retrieved(embeddings, owner)
        looked_at = self._look(records, similarity, self.retrieval.rerank)
        return Retrieved(retrieval_scores(looked_at, images, owner), owner, embeddings)

    def _look(self, records: Sequence[Record], similarity: NDArray, k: int) -> NDArray:
        """`rerank` of the records' images and texts."""
        model = self.model
        tokens = torch.from_numpy(np.stack([r["tokens"] for r in records]))
        joined = join_texts([text for r in records for text in r["ids"]], model.config.text.pad_id, model.device)
        return rerank(model, tokens, joined, similarity, k, self.retrieval.by)


@dataclass(frozen=True)
class Retrieved:
    """final: the scores that count. owner: (M,), each text's image. embeddings: those before the second look, where there was one."""

    final: RetrievalScores
    owner: NDArray
    embeddings: RetrievalScores | None = None
