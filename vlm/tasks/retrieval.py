"""Retrieval by embeddings: what is kept of a batch, and compared. Letters: B images, T texts, E width of the embeddings, n texts of an image."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm.data.batch import Batch
from vlm.metrics.retrieval import RetrievalScores, retrieval_scores
from vlm.model.vision_language import ImageFeatures, VisionLanguageModel
from vlm.tasks.task import Record


def embedded(model: VisionLanguageModel, features: ImageFeatures, batch: Batch) -> list[Record]:
    """For each image its embedding (E,) and those of its texts (n, E). features: the images', encoded."""
    texts = batch.texts
    embeddings = model.encode_text(texts.ids, texts.mask).embedding
    assert embeddings is not None
    image, text = features.embedding.float().cpu().numpy(), embeddings.float().cpu().numpy()
    owner = texts.image.cpu().numpy()
    return [{"image": image[i], "texts": text[owner == i]} for i in range(len(batch))]


def similarities(records: Sequence[Record]) -> tuple[NDArray, NDArray]:
    """(B, T) of all records' images and texts; (T,) each text's image."""
    images = np.stack([r["image"] for r in records])
    texts = np.concatenate([r["texts"] for r in records])
    return images @ texts.T, np.repeat(np.arange(len(records)), [len(r["texts"]) for r in records])


def recalls(records: Sequence[Record]) -> RetrievalScores:
    """Among the records at hand."""
    similarity, owner = similarities(records)
    return retrieval_scores(similarity, np.arange(len(records)), owner)
