"""Evaluation of a part of a set: the same images for every number of ranks, and nothing counted that was not looked at."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from vlm.data.batch import Batch
from vlm.data.loader import Loader
from vlm.data.shards import ShardSet
from vlm.errors import UserError
from vlm.evaluation import evaluate_loader
from vlm.train.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


class Keys:
    """In place of a task: it predicts the samples' names."""

    def predict(self, batch: Batch) -> list[dict[str, Any]]:
        return [{"key": key} for key in batch.keys]

    def evaluate(self, records: Sequence[Any]) -> dict[str, float]:
        return {"images": float(len(records))}


def test_ranks_evaluate_the_same_images_and_count_theirs(
    write_set: Callable[..., ShardSet], make_loader: Callable[..., Loader]
) -> None:
    shards = write_set(samples=32, broken=(5, 17))
    for world in (1, 2, 4):
        keys: list[str] = []
        left_out = 0.0
        for rank in range(world):
            loader = make_loader(shards, rank=rank, world=world, training=False, max_bad_fraction=1.0)
            scores, records = evaluate_loader(Keys(), loader, ALONE, "toy", images=16)  # type: ignore[arg-type]
            keys += [record["key"] for record in records]
            left_out += scores.get("left_out", 0.0)
        assert sorted(keys) == [f"k{i:03d}" for i in range(16) if i != 5]
        assert left_out == 1


def test_nothing_to_score_is_an_error(write_set: Callable[..., ShardSet], make_loader: Callable[..., Loader]) -> None:
    loader = make_loader(write_set(samples=20, broken=range(8)), training=False, max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"toy: none of 8 samples can be used \(8 x undecodable image\)"):
        evaluate_loader(Keys(), loader, ALONE, "toy", images=8)  # type: ignore[arg-type]
