"""The order of an epoch: a pure function of the sets, the mixture, the seed, the epoch, `streams` and `shuffle_block`.

The shards of all sets are permuted and laid end to end; these N records are cut into S contiguous streams, and blocks of each stream are permuted.
The global sequence deals the streams out in turn, g[p] = stream[p % S][p // S]; global batch k is g[kB : (k+1)B]. A rank owns the streams s with
s % world == rank and a worker some of these, so neither their number nor a fault changes what a batch holds.

A mixture says how many passes over each set an epoch is: 2 takes each record twice, 0.5 one half in this epoch and the other in the next. A set is
read pass after pass, each a new permutation of its shards, and an epoch takes the next round(weight x records) of these: every record once in each
pass, and the same number of records in every epoch.

Letters: N records of an epoch, S streams, B samples of a global batch, p place in the global sequence, j place in a stream.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from vlm.data.random import keyed_generator
from vlm.data.shards import ShardInfo, ShardSet
from vlm.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where a record lies: its set, the shard, the record's number in it; and which pass over the set this is (without a mixture the epoch)."""

    shards: ShardSet
    shard: ShardInfo
    number: int
    turn: int


class Piece(NamedTuple):
    """Records `first` to `first + samples` (not included) of a shard, in pass `turn` over its set."""

    shards: ShardSet
    shard: ShardInfo
    first: int
    samples: int
    turn: int


class EpochOrder:
    """The records of one epoch by stream and place in it.

    Without `shuffle` (evaluation) the sequence is that of the files: stream s holds the records s, s + S, s + 2S, ...; S then says only who reads.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        seed: int,
        epoch: int,
        streams: int,
        shuffle_block: int = 1000,
        shuffle: bool = True,
        mixture: Sequence[float] = (),
    ) -> None:
        if shuffle_block < 1:
            raise ConfigError(
                f"shuffle_block={shuffle_block}; expected at least 1 (1 keeps the order inside a stream)."
            )
        self.seed, self.epoch, self.streams, self.block, self.shuffle = seed, epoch, streams, shuffle_block, shuffle
        counts = epoch_samples(sets, mixture)
        self._pieces = [piece for i, s in enumerate(sets) for piece in _pieces(s, counts[i], epoch, (seed, i))]
        if shuffle:
            permutation = torch.randperm(len(self._pieces), generator=keyed_generator(seed, epoch, "shards"))
            self._pieces = [self._pieces[i] for i in permutation.tolist()]
        self._starts = [0, *accumulate(piece.samples for piece in self._pieces)]
        self.samples = self._starts[-1]
        self._blocks: dict[int, tuple[int, array[int]]] = {}  # the last permutation of each stream

    def length(self, stream: int) -> int:
        """Records of a stream; the first N % S streams have one more."""
        return self.samples // self.streams + (stream < self.samples % self.streams)

    def place(self, stream: int, j: int) -> Place:
        """The record at place j of a stream."""
        if self.shuffle:
            block, within = divmod(j, self.block)
            j = block * self.block + self._permutation(stream, block)[within]
        return self._locate(self._record(stream, j))

    def shards_of(self, stream: int, block: int) -> list[tuple[ShardSet, ShardInfo]]:
        """The shards that a block of a stream lies in; none beyond its end."""
        first, last = block * self.block, min((block + 1) * self.block, self.length(stream)) - 1
        if last < first:
            return []
        pieces = range(self._piece(self._record(stream, first)), self._piece(self._record(stream, last)) + 1)
        return [(self._pieces[i].shards, self._pieces[i].shard) for i in pieces]

    def _record(self, stream: int, j: int) -> int:
        """Place j of a stream before its blocks are permuted, as a place in the order of the pieces."""
        if not self.shuffle:
            return stream + j * self.streams
        whole, more = divmod(self.samples, self.streams)
        return stream * whole + min(stream, more) + j

    def _permutation(self, stream: int, block: int) -> "array[int]":
        known = self._blocks.get(stream)
        if known is None or known[0] != block:
            count = min(self.block, self.length(stream) - block * self.block)
            generator = keyed_generator(self.seed, self.epoch, "block", stream, block)
            known = self._blocks[stream] = (block, array("i", torch.randperm(count, generator=generator).tolist()))
        return known[1]

    def _piece(self, record: int) -> int:
        return bisect_right(self._starts, record) - 1

    def _locate(self, record: int) -> Place:
        index = self._piece(record)
        piece = self._pieces[index]
        return Place(piece.shards, piece.shard, piece.first + record - self._starts[index], piece.turn)


def epoch_samples(sets: Sequence[ShardSet], mixture: Sequence[float] = ()) -> list[int]:
    """How many records of each set an epoch has, the same in every epoch: at least one of a set that has any.

    Raises:
        ConfigError: the mixture does not have one weight above 0 for each set.
    """
    weights = mixture_weights(sets, mixture)
    return [max(1, round(weight * s.samples)) if s.samples else 0 for s, weight in zip(sets, weights, strict=True)]


def mixture_weights(sets: Sequence[ShardSet], mixture: Sequence[float]) -> Sequence[float]:
    """One for each set. Raises ConfigError where the mixture does not have that many, all above 0."""
    if not mixture:
        return [1.0] * len(sets)
    if len(mixture) != len(sets) or not all(weight > 0 for weight in mixture):
        raise ConfigError(f"mixture={list(mixture)}; expected {len(sets)} weights above 0, one for each set.")
    return mixture


def _pieces(shards: ShardSet, count: int, epoch: int, key: tuple[int, int]) -> Iterator[Piece]:
    """The records of a set that an epoch takes: `count` of them, where the epoch before ended."""
    if not shards.samples:
        return
    place, stop = epoch * count, (epoch + 1) * count
    while place < stop:
        turn, start = divmod(place, shards.samples)
        end = min(start + stop - place, shards.samples)
        yield from _part(shards, turn, start, end, key)
        place += end - start


def _part(shards: ShardSet, turn: int, start: int, end: int, key: tuple[int, int]) -> Iterator[Piece]:
    """Records `start` to `end` of a pass. A whole pass needs no order of its own, as the epoch permutes its pieces."""
    order = shards.shards
    if end - start < shards.samples:
        permutation = torch.randperm(len(order), generator=keyed_generator(*key, turn, "pass"))
        order = tuple(order[i] for i in permutation.tolist())
    begin = 0
    for shard in order:
        first, last = max(start - begin, 0), min(end - begin, shard.samples)
        if first < last or first == last == 0:
            yield Piece(shards, shard, first, last - first, turn)
        begin += shard.samples


def batch_places(step: int, batch_size: int, samples: int, rank: int = 0, world: int = 1) -> range:
    """The places p of the global sequence that form this rank's part of global batch `step`; shorter, or empty, in the last one of an evaluation."""
    first = step * batch_size
    return range(first + (rank - first) % world, min(first + batch_size, samples), world)


def worker_places(places: range, streams: int, worker: int, workers: int, world: int = 1) -> list[int]:
    """Those of a rank's places that one of its workers reads: the rank's i-th stream belongs to worker i % workers."""
    return [p for p in places if p % streams // world % workers == worker]


def check_split(streams: int, batch_size: int, world: int) -> None:
    """Raises ConfigError, with the nearest choices, where the ranks cannot take equal parts."""
    for name, value in (("streams", streams), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value}; expected at least 1.")
        if value % world:
            below, above = value // world * world, (value // world + 1) * world
            choices = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(f"{name}={value} cannot be divided over {world} ranks; use {choices}.")


def automatic_streams(batch_size: int, remote: bool) -> int:
    """As many as a batch has records, so that each batch has one of every part of the epoch; from 64 on, in multiples of the batch.

    Fewer make batches in a row of few shards, more make each of a part of the epoch (benchmarks/shuffle.py). Of remote shards, which
    the cache must hold for all streams, 64.
    """
    return 64 if remote else -(-64 // batch_size) * batch_size
