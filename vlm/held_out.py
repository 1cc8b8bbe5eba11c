"""Honest splits: no image that a model was trained on, in any task, is one that it is scored on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm.checkpoint import read_trained_on
from vlm.data.index import ShardSet
from vlm.data.scan import image_ids
from vlm.errors import UserError
from vlm.hub import local_folder
from vlm.train.report import say

CHECKED_IMAGES = 2_000_000
"""Above this many training images their identities are not kept, and the check is left to the user."""


def training_images(sets: Sequence[ShardSet], init_from: str | None) -> Tensor | None:
    """Sorted identities (N,) int64 of all images that the model will have been trained on, with those of the checkpoint it starts from; None where
    nothing is known. Of more images than are checked, or of shards that are not counted, those of the checkpoint alone, which is said.
    """
    before = read_trained_on(local_folder(init_from)) if init_from is not None else None
    images = sum(s.samples for s in sets)
    if images > CHECKED_IMAGES:
        say(
            f"{images:,} training images, more than {CHECKED_IMAGES:,}: nothing will notice an evaluation on one of them"
        )
        return before
    if not all(s.counted for s in sets):  # the loader says so
        return before
    ids = image_ids(sets) | (set(before.tolist()) if before is not None else set())
    return torch.tensor(sorted(ids), dtype=torch.long)


def check_held_out(trained_on: Tensor | None, shards: ShardSet, allow: bool) -> None:
    """Refuses to evaluate on images that were trained on, in this task or an earlier one.

    Raises:
        UserError: names how many.
    """
    if trained_on is None or allow:
        return
    ids = torch.tensor(sorted(image_ids([shards])), dtype=torch.long)
    known = int(torch.isin(ids, trained_on).sum())
    if known:
        raise UserError(
            f"{shards.root}: {known} of its {len(ids)} images were trained on (in this or an earlier task), so its scores would lie. "
            "Split by image (see the prepare.py scripts), or set --data.allow-overlap True if that is what you want to measure."
        )
