"""Shards -> Batches: reads, encodes and joins samples in the epoch's order (order.py), in this process or in workers, with the same result.

Each worker yields, for every step in turn, its samples of that step's batch with their places; torch's DataLoader hands the workers' items out
strictly in turn, so this process joins one item of each worker a step.

A bad sample's slot is filled by the preceding good sample of its stream, silenced, and counted: shapes, steps and position never depend on faults. An
evaluation leaves bad samples out instead, as scores over the wrong images would lie.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlm.data.batch import Batch
from vlm.data.collate import SampleEncoder, collate
from vlm.data.order import EpochOrder, batch_places, check_split, epoch_samples, worker_places
from vlm.data.reading import Order, SampleSource, Slot
from vlm.data.remote import is_remote, limit
from vlm.data.resampled import NO_PROMISE, UNCHECKED, ResampledOrder
from vlm.data.shards import ShardSet
from vlm.errors import UserError
from vlm.memory import release_freed_memory

log = logging.getLogger(__name__)
CHECKED_AFTER = 100  # samples, before the share of bad ones says anything


class Loader:
    """Batches of one epoch after another.

    sets: what to read. encode: makes samples of records. batch_size: samples of a global batch, over all ranks. streams, shuffle_block: see order.py.
    workers: processes that read (0: this one). rank, world: which part of every global batch this process takes. training: shuffle, drop the last
    partial batch, fill bad slots; otherwise (evaluation) the order of the files, every record exactly once over the ranks.
    mixture: passes over each set in an epoch (order.py); empty: each record once. declared: records of an epoch whose shards are drawn with
    replacement (resampled.py), which is said in the log; None: each record is read once.

    `bad` counts the bad samples of the present epoch by cause, on this rank. One process stops by itself where they are too many; several have to
    `check`, as the share of one rank says little. Raises ConfigError where ranks cannot take equal parts, UserError for
    a set that is too small.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        encode: SampleEncoder,
        batch_size: int,
        seed: int = 0,
        streams: int = 64,
        shuffle_block: int = 1000,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        training: bool = True,
        max_bad_fraction: float = 0.1,
        mixture: Sequence[float] = (),
        declared: int | None = None,
    ) -> None:
        self.sets, self.encode, self.batch_size, self.seed = tuple(sets), encode, batch_size, seed
        self.shuffle_block, self.workers, self.rank, self.world = shuffle_block, workers, rank, world
        self.training, self.max_bad_fraction, self.mixture = training, max_bad_fraction, tuple(mixture)
        # an evaluation's order does not depend on streams: as many as there are readers
        self.streams = streams if training else world * max(workers, 1)
        self.declared = declared
        self.samples = sum(epoch_samples(self.sets, self.mixture)) if declared is None else declared
        self.bad: Counter[str] = Counter()
        self._seen = 0
        self._examples: dict[str, str] = {}
        check_split(self.streams, batch_size, world if training else 1)
        names = ", ".join(s.root for s in self.sets)
        if self.samples == 0 or self.steps == 0:
            need = f"batch_size={batch_size}; use a smaller batch" if self.samples else "at least one"
            raise UserError(f"{names or 'no set of shards'}: {self.samples} samples, expected {need}.")
        here = self.streams * int(os.environ.get("LOCAL_WORLD_SIZE", world)) // world  # torchrun's, of this machine
        wanted, cache = room_wanted(self.sets, here, shuffle_block), self.sets[0].cache
        self.ahead = 2 * wanted <= limit(cache)  # room for the shards that are read, and for the next ones
        if declared is not None and rank == 0:
            log.warning("%s%s", NO_PROMISE, "" if all(s.counted for s in self.sets) else UNCHECKED)
        if training and rank == 0 and wanted > limit(cache):
            log.warning(
                "data.cache.gigabytes=%g, but the streams of this machine read shards of about %.3g GB at one time, which will be fetched again and "
                "again; raise it, or lower data.streams or data.shuffle_block",
                *(cache.gigabytes, wanted / 1e9),
            )

    @property
    def steps(self) -> int:
        """Global batches of an epoch, equal on every rank; the last, partial one counts in evaluation only."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (rest > 0 and not self.training)

    def iterate(self, epoch: int, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """This rank's batches of an epoch from step `start_step` on: batch_size / world samples each. stop_step: the first that is not wanted, and
        not read or counted either; None takes all.

        In evaluation a rank's last batches may be smaller, and one that is left without samples is passed over. Raises UserError where no sample can
        be found to fill a slot with and, in a single process, where more than `max_bad_fraction` of the samples (at least 100) are bad, or all.
        """
        stop_step = self.steps if stop_step is None else stop_step
        if not 0 <= start_step <= stop_step <= self.steps:
            raise ValueError(
                f"start_step={start_step} and stop_step={stop_step}; expected 0..{self.steps}, the steps of an epoch."
            )
        self.bad, self._seen, self._examples = Counter(), 0, {}
        work = _Steps(
            self._order(epoch),
            *(self.encode, self.batch_size, self.rank, self.world, self.training, start_step, stop_step, self.ahead),
        )
        pin = torch.cuda.is_available()
        for slots in self._joined(work):
            filled = self._count(slots)
            self._seen += len(slots)
            if self.world == 1:
                self._judge(self._seen, self.bad, self._examples, ended=False)
            samples = [slot.sample for slot in slots if slot.sample is not None]
            if samples:
                yield collate(samples, self.encode.pad_id, filled, pin)
        if self.world == 1:
            self._judge(self._seen, self.bad, self._examples, ended=(start_step, stop_step) == (0, self.steps))

    def check(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        """Whether too many of all ranks' samples of the present epoch are bad, so that the number of ranks decides nothing. Every rank must ask, at
        the same step; one process has no need to. gather: all ranks' items in one order, on every rank.

        Raises:
            UserError: on every rank, with the sums.
        """
        if self.world == 1:
            return
        seen, bad, examples = 0, Counter[str](), dict[str, str]()
        for here, counts, told in gather([(self._seen, dict(self.bad), self._examples)]):
            seen, examples = seen + here, told | examples
            bad.update(counts)
        self._judge(seen, bad, examples, ended=not self.training)

    def _order(self, epoch: int) -> Order:
        plan = self.sets, self.seed, epoch, self.streams
        if self.declared is not None:
            return ResampledOrder(*plan, self.declared, self.shuffle_block, self.mixture)
        return EpochOrder(*plan, self.shuffle_block, self.training, self.mixture)

    def _joined(self, work: "_Steps") -> Iterator[list[Slot]]:
        """The slots of each step in order of place."""
        if self.workers == 0:
            for item in work:
                yield _unpack(item)
            return
        release_freed_memory()
        parts = iter(
            DataLoader(
                work,
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=2,
                multiprocessing_context=_context(),
                worker_init_fn=partial(_start_worker, os.getpid()),
                generator=torch.Generator(),  # else torch draws a seed from the global one, and the number of workers would change a run
            )
        )
        for _ in range(work.start, work.stop):
            slots = [slot for _ in range(self.workers) for slot in _unpack(next(parts))]
            yield sorted(slots, key=lambda slot: slot.place)

    def _count(self, slots: Sequence[Slot]) -> dict[str, int]:
        """The bad slots of one step by cause; the first of each cause in an epoch is told."""
        here = Counter(slot.cause for slot in slots if slot.cause is not None)
        for slot in slots:
            if slot.cause is not None and slot.cause not in self._examples:
                what = "its slot is filled by another sample without weight" if self.training else "it is left out"
                log.warning("bad sample, %s (the first of this cause): %s", what, slot.message)
                self._examples[slot.cause] = slot.message
        self.bad.update(here)
        return dict(here)

    def _judge(self, seen: int, bad: Counter[str], examples: Mapping[str, str], ended: bool) -> None:
        """Raises UserError where too many of `seen` samples are bad, or all when the epoch has ended."""
        count = bad.total()
        if (count > self.max_bad_fraction * seen and seen >= CHECKED_AFTER) or (count == seen > 0 and ended):
            causes = ", ".join(f"{n} x {cause}" for cause, n in bad.most_common())
            raise UserError(
                f"{count} of {seen} samples cannot be used ({causes}), more than max_bad_fraction={self.max_bad_fraction}. "
                f"For example: {next(iter(examples.values()))} Mend the shards, or raise max_bad_fraction."
            )


@dataclass
class _Packed:
    """Slots on their way between processes: one tensor of all images, as each tensor costs a file descriptor."""

    slots: list[Slot]
    images: Tensor | None


class _Steps(IterableDataset[Any]):
    """What one worker (or this process) reads: for every step the slots that are its own. A UserError is yielded, as torch would bury its message."""

    def __init__(
        self,
        order: Order,
        encode: SampleEncoder,
        batch_size: int,
        rank: int,
        world: int,
        training: bool,
        start: int,
        stop: int,
        ahead: bool,
    ) -> None:
        self.order, self.encode, self.training, self.ahead = order, encode, training, ahead
        self.batch_size, self.rank, self.world, self.start, self.stop = batch_size, rank, world, start, stop

    def __iter__(self) -> Iterator[list[Slot] | _Packed | UserError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        source = SampleSource(self.order, self.encode, self.training)
        try:
            for step in range(self.start, self.stop):
                places = batch_places(step, self.batch_size, self.order.samples, self.rank, self.world)
                mine = worker_places(places, self.order.streams, worker, workers, self.world)
                if self.ahead:
                    source.look_ahead(mine)
                slots = list(source.slots(mine))
                yield _pack(slots) if info else slots
        except UserError as error:
            yield error
        finally:
            source.reader.close()


def _pack(slots: list[Slot]) -> _Packed:
    full = [slot.sample for slot in slots if slot.sample is not None]
    if not full:
        return _Packed(slots, None)
    images, nothing = torch.stack([sample.image for sample in full]), torch.empty(0)
    bare = [replace(s, sample=replace(s.sample, image=nothing)) if s.sample is not None else s for s in slots]
    return _Packed(bare, images)


def _unpack(item: list[Slot] | _Packed | UserError) -> list[Slot]:
    if isinstance(item, UserError):
        raise item
    if isinstance(item, list):
        return item
    rows = iter(item.images if item.images is not None else ())
    return [replace(s, sample=replace(s.sample, image=next(rows))) if s.sample is not None else s for s in item.slots]


def _context() -> Any:
    """How workers are started: forked, which is immediate, while this process is plain; from a clean server process once CUDA runs in it.

    The driver's threads and locks do not survive a fork. torch's idle threads do not either, but a worker computes with one thread and never misses
    them.
    """
    if not sys.platform.startswith("linux"):
        return None
    if not torch.cuda.is_initialized():
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm.data.loader"])  # imported once in the server, not once a worker
    return context


def _start_worker(main: int, _: int) -> None:
    """Makes a worker deaf to stop requests of anyone but the main process.

    A request reaches the whole process group, but the main process decides: it still needs its workers to end the step and save.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(main,), daemon=True).start()


def _obey(main: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)


def room_wanted(sets: Sequence[ShardSet], streams: int, block: int) -> float:
    """Bytes of the remote shards that so many streams read at one time, in blocks of so many records; at most all of them."""
    remote = [s for s in sets if is_remote(s.root)]
    shards = [shard for s in remote for shard in s.shards]
    if not shards:
        return 0.0
    whole, samples = sum(s.bytes for s in shards), sum(s.samples for s in remote)
    a_block = 1 + block * len(shards) / max(samples, 1)  # a block lies in so many shards
    return min(whole, streams * a_block * whole / len(shards))
