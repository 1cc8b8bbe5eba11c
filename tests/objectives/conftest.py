"""Batches and features with given contents, for values that can be worked out by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.data.batch import Batch, Texts
from vlm.model.vision_language import ImageFeatures, TextFeatures
from vlm.objectives.objective import Features


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """make_batch(ids, lengths=..., image=..., image_ids=..., prompt=..., weight=...): texts with these contents; one image each by default."""

    def make(
        ids: Sequence[Sequence[int]],
        lengths: Sequence[int] | None = None,
        image: Sequence[int] | None = None,
        image_ids: Sequence[int] | None = None,
        prompt: Sequence[int] | None = None,
        weight: Sequence[float] | None = None,
        describes: Sequence[bool] | None = None,
    ) -> Batch:
        count, length = len(ids), len(ids[0])
        texts = Texts(
            torch.tensor(ids),
            torch.arange(length) < torch.tensor(lengths or [length] * count)[:, None],
            torch.tensor(image or list(range(count))),
            torch.tensor(prompt or [1] * count),
            torch.tensor(weight or [1.0] * count),
            torch.tensor(describes or [True] * count),
        )
        images = int(texts.image.max()) + 1
        whose = torch.tensor(image_ids or list(range(1, images + 1)))
        return replace(Batch.fake(images), image_ids=whose, texts=texts)

    return make


@pytest.fixture
def make_features() -> Callable[[Batch, Tensor, Tensor], Features]:
    """make_features(batch, image embeddings (B, E), text embeddings (T, E))."""

    def make(batch: Batch, image: Tensor, text: Tensor) -> Features:
        plain = TextFeatures(batch.texts.ids, batch.texts.mask, None, text)
        return Features(ImageFeatures(image[:, None], image), {"plain": plain}, {})

    return make


@pytest.fixture
def heads() -> Any:
    """In place of a model: the states are the logits already, the temperature is 0.5."""

    def same(states: Tensor) -> Tensor:
        return states

    def first(states: Tensor) -> Tensor:
        return states[:, 0]

    temperature = torch.tensor(0.5)
    return SimpleNamespace(
        masked_language_logits=same, language_logits=same, matching_logits=first, temperature=temperature
    )
