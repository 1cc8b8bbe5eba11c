"""The batches that a loop reads, one epoch after another, and how it ends where a rank cannot read its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from vlm.data.batch import Batch
from vlm.errors import UserError
from vlm.train.distributed import Ranks
from vlm.train.report import say


class TrainingLoader(Protocol):
    """What the loop needs of the data: `steps` batches an epoch, readable from any step to any other."""

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        ...

    def iterate(self, epoch: int, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """The epoch's batches from one step to before another."""
        ...

    def check(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        """Raises UserError on all ranks where too many of their samples are bad."""
        ...


def batches_from(loader: TrainingLoader, step: int, epoch_steps: int, accumulate: int, ranks: Ranks) -> Iterator[Batch]:
    """All batches from an optimizer step on, without end: `accumulate` of them a step, `epoch_steps` steps an epoch."""
    while True:
        epoch, start = divmod(step, epoch_steps)
        yield from loader.iterate(epoch, start * accumulate, epoch_steps * accumulate)
        loader.check(ranks.gather)  # an epoch may end without a line of the log
        step = (epoch + 1) * epoch_steps


@contextmanager
def leaving_together(ranks: Ranks, keep: Callable[[], object]) -> Iterator[None]:
    """Around what reads data between two steps: where it fails on any rank, all of them call `keep`, which saves the last step, and leave.

    Every rank must come here. Of what fails in the midst of a step one rank alone may know, and saving would wait for the others for ever: there,
    a run loses what was done since it was saved.

    Raises:
        Exception: what this rank failed of. UserError: another one did.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not ranks.any(failure is not None):
        return
    try:
        keep()
    except UserError as error:  # what stopped the run is told, too
        say(str(error))
    raise failure or UserError("another rank cannot read its data, and says why.")
