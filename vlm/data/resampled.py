"""The order of an epoch of a declared length, over shards whose records nobody counted: drawn with replacement, by key.

Each stream is made of blocks. A block draws one shard after another by key (seed, epoch, stream, block, draw) until their records fill it, and
permutes them; of the last shard it takes as many as there is room for, drawn. So a place is found without the blocks before its own, and the batches
are the same for every number of ranks and workers and after a resumption, which reads at most one block of each stream again.

Nothing promises that a record is read once an epoch, or at all. A shard that cannot be read is one bad sample, and the next one is drawn; as long
as all can be read, batches depend on nothing else.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count

import torch

from vlm.data.index import ShardInfo, ShardSet
from vlm.data.order import Place, mixture_weights
from vlm.data.random import keyed_generator, keyed_seed
from vlm.data.records import ShardReader
from vlm.errors import ConfigError

NO_PROMISE = "data.order=resampled: shards are drawn with replacement, so nothing promises that a record is read exactly once in an epoch, or at all"
UNCHECKED = "; images that are also in an evaluation set are not looked for, as shards without an index are not read through before"
Draw = tuple[ShardSet, ShardInfo, int]  # and its key


@dataclass
class _Block:
    """What a block drew, and for each of its places which draw it is of and the number of its record there."""

    number: int
    draws: list[Draw] = field(default_factory=list)
    of: "array[int]" = field(default_factory=lambda: array("i"))
    records: "array[int]" = field(default_factory=lambda: array("i"))


class ResampledOrder:
    """As EpochOrder, over `samples` records. `reader` opens the shards that a block needs and is to be the one that reads them."""

    def __init__(
        self,
        sets: Sequence[ShardSet],
        seed: int,
        epoch: int,
        streams: int,
        samples: int,
        shuffle_block: int = 1000,
        mixture: Sequence[float] = (),
    ) -> None:
        """mixture: how often a record of each set is drawn in relation to the others'; empty: all alike."""
        if shuffle_block < 1:
            raise ConfigError(f"shuffle_block={shuffle_block}; expected at least 1.")
        self.seed, self.epoch, self.streams, self.samples, self.block = seed, epoch, streams, samples, shuffle_block
        weights = mixture_weights(sets, mixture)
        self._shards = [(s, shard) for s in sets for shard in s.shards]
        self._bounds = [*accumulate(w for s, w in zip(sets, weights, strict=True) for _ in s.shards)]
        self._blocks: dict[int, _Block] = {}  # the last one of each stream
        self.reader = ShardReader()

    def length(self, stream: int) -> int:
        """Records of a stream."""
        return self.samples // self.streams + (stream < self.samples % self.streams)

    def place(self, stream: int, j: int) -> Place:
        """The record at place j of a stream; of a shard that cannot be read its first, which reading it then says."""
        number, within = divmod(j, self.block)
        block = self._blocks.get(stream)
        if block is None or block.number != number:
            block = self._blocks[stream] = self._drawn(stream, number)
        shards, shard, key = block.draws[block.of[within]]
        return Place(shards, shard, block.records[within], key)

    def shards_of(self, stream: int, block: int) -> list[tuple[ShardSet, ShardInfo]]:
        """The first shards of a block, as many as the stream's present one has; how many more it will need is not known yet."""
        if block * self.block >= self.length(stream):
            return []
        known = self._blocks.get(stream)
        draws = self._draws(stream, block)
        return [next(draws)[:2] for _ in range(len(known.draws) if known is not None else 1)]

    def _draws(self, stream: int, block: int) -> Iterator[Draw]:
        for number in count():
            key = keyed_seed(self.seed, self.epoch, "draw", stream, block, number)
            at = bisect_right(self._bounds, key / 2**64 * self._bounds[-1])
            yield *self._shards[min(at, len(self._shards) - 1)], key

    def _drawn(self, stream: int, number: int) -> _Block:
        room = min(self.block, self.length(stream) - number * self.block)
        block = _Block(number)
        of: list[int] = []
        records: list[int] = []
        for draw in self._draws(stream, number):
            shards, shard, key = draw
            held = max(1, self.reader.count(shards.locate(shard)))
            taken = torch.randperm(held, generator=keyed_generator(key, "records"))[: room - len(records)].tolist()
            of += [len(block.draws)] * len(taken)
            records += taken
            block.draws.append(draw)
            if len(records) == room:
                break
        generator = keyed_generator(self.seed, self.epoch, "block", stream, number)
        for i in torch.randperm(room, generator=generator).tolist():
            block.of.append(of[i])
            block.records.append(records[i])
        return block
