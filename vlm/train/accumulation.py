"""Micro-batches of an optimizer step whose pair losses are those of the whole batch: `vlm.objectives.cached`, arranged."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlm.data.batch import Batch
from vlm.tasks.task import Task


def arguments(
    task: Task, micro: Sequence[Batch], autocast: Callable[[], AbstractContextManager[Any]]
) -> Iterator[tuple[Any, ...]]:
    """What the task is to be called with for each micro-batch in turn: the micro-batch alone where no objective compares it with the others.

    Otherwise all are encoded before the first comes, and the generators are set back for each, so that dropout and its like fall as they did.
    """
    if len(micro) == 1 or not task.paired:
        for batch in micro:
            yield (batch,)
        return
    # Of its own seed each, because the second pass draws more than the first one: going on from the states of the first, a micro-batch would
    # draw for its fusion layers what the next one has drawn for its image.
    seeds: list[int] = torch.randint(2**62, (len(micro),)).tolist()
    parts = []
    with _statistics_kept(task.model):
        for seed, batch in zip(seeds, micro, strict=True):
            torch.manual_seed(seed)
            with autocast():
                parts.append(task.embed(batch))
    for seed, batch, cached in zip(seeds, micro, task.compare(parts), strict=True):
        torch.manual_seed(seed)
        yield batch, cached


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norms that learn statistics see each micro-batch once, in the second pass."""
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training
        for buffer in module.buffers()
    ]
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
