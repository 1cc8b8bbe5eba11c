"""Long work over shards that a stop does not undo: results are kept beside the output, batch by batch."""

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm.data.index import ShardSet
from vlm.data.walk import Found, walk
from vlm.errors import UserError
from vlm.train.stopping import StopRequest


class Stopped(UserError):
    """Stopped on request, with what was done so far on the disk."""

    exit_code = 3


class WorkLog:
    """One result for each place of some shards, in a file beside `out`: a line of settings, then a line a batch.

    A log of the same settings is gone on with. The same places are in a batch whenever it is done, so a stop changes nothing in the results.
    """

    def __init__(
        self, shards: ShardSet, out: Path, settings: dict[str, Any], batch_size: int = 32, bare: bool = False
    ) -> None:
        """settings: JSON; all that the results depend on beside the shards. bare: images without a text are worked on too.

        Raises:
            UserError: there is a log of other settings, or it cannot be written.
        """
        self.shards, self.batch_size, self.bare = shards, batch_size, bare
        self.path = out.absolute().with_name(f".{out.name}.begun.jsonl")
        held = [[shard.name, shard.samples, shard.bytes] for shard in shards.shards]
        given = {**settings, "batch_size": batch_size, "shards": held}
        self._head = json.dumps(given, sort_keys=True) + "\n"
        try:
            self._done = self._reopen(out, given)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}; free some space or choose another folder."
            ) from None

    def fill(self, work: Callable[[list[Found]], list[Any]], what: str) -> None:
        """Does the batches that are missing. work: JSON for each of its places.

        Raises:
            Stopped: on SIGTERM, SIGUSR1 or Ctrl-C, after the batch.
        """
        first = min(self._done * self.batch_size, self.shards.samples)
        found = walk(self.shards, first, strict=True, bare=self.bare)
        with (
            StopRequest() as stop,
            self.path.open("a", encoding="utf-8") as file,
            tqdm(total=self.shards.samples, initial=first, desc=what, unit=" images", mininterval=0.5) as bar,
        ):
            while batch := list(islice(found, self.batch_size)):
                file.write(json.dumps(work(batch)) + "\n")
                file.flush()
                self._done += 1
                bar.update(len(batch))
                if stop.made:
                    raise Stopped(
                        f"stopped on request; {bar.n:,} of {bar.total:,} images are done and kept: give the same command to go on."
                    )

    def results(self) -> Iterator[Any]:
        """Of every place in order."""
        with self.path.open(encoding="utf-8") as file:
            next(file)
            for line in file:
                yield from json.loads(line)

    def remove(self) -> None:
        """When all is written that was to come of it."""
        self.path.unlink(missing_ok=True)

    def _reopen(self, out: Path, given: dict[str, Any]) -> int:
        """How many batches are done. A last line that was cut is left out."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self._head, encoding="utf-8")
            return 0
        end = lines = 0
        with self.path.open("rb") as file:
            head = file.readline()
            for line in (head, *file):
                if line.endswith(b"\n"):
                    end, lines = end + len(line), lines + 1
        if head.decode("utf-8", "replace") != self._head and lines:
            raise UserError(
                f"{out} was begun with other settings ({_difference(head, given)}); give those to go on, or remove {self.path} to begin anew."
            )
        os.truncate(self.path, end)
        if not lines:
            self.path.write_text(self._head, encoding="utf-8")
        return max(lines - 1, 0)


def _difference(head: bytes, given: dict[str, Any]) -> str:
    try:
        begun = json.loads(head)
        names = [name for name in {**begun, **given} if begun.get(name) != given.get(name)]
    except (ValueError, AttributeError):
        return "they cannot be read"
    return ", ".join(name if name in ("shards", "model") else f"{name} {begun.get(name)}" for name in names)
