"""A reader keeps some files open, no more, however many shards it reads."""

import os
from collections.abc import Callable

from vlm.data.index import ShardSet
from vlm.data.records import MAX_OPEN_FILES, ShardReader


def test_descriptors_do_not_grow_with_the_shards(write_set: Callable[..., ShardSet]) -> None:
    shards = write_set("many", 2 * MAX_OPEN_FILES, 1)
    before, reader = len(os.listdir("/proc/self/fd")), ShardReader()
    for _ in range(2):
        for number, shard in enumerate(shards.shards):
            assert reader.read(shards.locate(shard), shards.source, 0).key == f"k{number:03d}"
    assert len(os.listdir("/proc/self/fd")) - before == MAX_OPEN_FILES
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
