"""The order of an epoch: a pure function of the sets, the seed, the epoch, `streams` and `shuffle_block`.

The shards of all sets are permuted and laid end to end; these N records are cut into S contiguous streams, and blocks of each stream are permuted.
The global sequence deals the streams out in turn, g[p] = stream[p % S][p // S]; global batch k is g[kB : (k+1)B]. A rank owns the streams s with
s % world == rank and a worker some of these, so neither their number nor a fault changes what a batch holds.

Letters: N records, S streams, B samples of a global batch, p place in the global sequence, j place in a stream.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from vlm.data.random import keyed_generator
from vlm.data.shards import ShardInfo, ShardSet
from vlm.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where a record lies: its set, the shard, and the record's number in it."""

    shards: ShardSet
    shard: ShardInfo
    number: int


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
    ) -> None:
        if shuffle_block < 1:
            raise ConfigError(
                f"shuffle_block={shuffle_block}; expected at least 1 (1 keeps the order inside a stream)."
            )
        self.seed, self.epoch, self.streams, self.block, self.shuffle = seed, epoch, streams, shuffle_block, shuffle
        self._shards = [(s, shard) for s in sets for shard in s.shards]
        if shuffle:
            permutation = torch.randperm(len(self._shards), generator=keyed_generator(seed, epoch, "shards"))
            self._shards = [self._shards[i] for i in permutation.tolist()]
        self._starts = [0, *accumulate(shard.samples for _, shard in self._shards)]
        self.samples = self._starts[-1]
        self._blocks: dict[int, tuple[int, list[int]]] = {}  # the last permutation of each stream

    def length(self, stream: int) -> int:
        """Records of a stream; the first N % S streams have one more."""
        return self.samples // self.streams + (stream < self.samples % self.streams)

    def place(self, stream: int, j: int) -> Place:
        """The record at place j of a stream."""
        if not self.shuffle:
            return self._locate(stream + j * self.streams)
        whole, more = divmod(self.samples, self.streams)
        start = stream * whole + min(stream, more)
        block, within = divmod(j, self.block)
        return self._locate(start + block * self.block + self._permutation(stream, block)[within])

    def _permutation(self, stream: int, block: int) -> list[int]:
        known = self._blocks.get(stream)
        if known is None or known[0] != block:
            count = min(self.block, self.length(stream) - block * self.block)
            generator = keyed_generator(self.seed, self.epoch, "block", stream, block)
            known = self._blocks[stream] = (block, torch.randperm(count, generator=generator).tolist())
        return known[1]

    def _locate(self, record: int) -> Place:
        index = bisect_right(self._starts, record) - 1
        shards, shard = self._shards[index]
        return Place(shards, shard, record - self._starts[index])


def batch_places(step: int, batch_size: int, samples: int, rank: int = 0, world: int = 1) -> range:
    """The places p of the global sequence that form this rank's part of global batch `step`; shorter, or empty, in the last one of an evaluation."""
    first = step * batch_size
    return range(first + (rank - first) % world, min(first + batch_size, samples), world)


def check_split(streams: int, batch_size: int, world: int) -> None:
    """Raises ConfigError, with the nearest choices, where the ranks cannot take equal parts."""
    for name, value in (("streams", streams), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value}; expected at least 1.")
        if value % world:
            below, above = value // world * world, (value // world + 1) * world
            choices = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(f"{name}={value} cannot be divided over {world} ranks; use {choices}.")
