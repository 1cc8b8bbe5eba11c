"""The next shards of each stream are fetched while the present ones are read: in time, once, within the cache, faults said in their place."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vlm.config import CacheConfig
from vlm.data import prefetch, remote
from vlm.data.index import ShardInfo, ShardSet, load_index
from vlm.data.loader import Loader
from vlm.data.order import EpochOrder
from vlm.data.prefetch import Prefetcher
from vlm.data.remote import RemoteShard
from vlm.data.resampled import ResampledOrder
from vlm.errors import ConfigError

MakeLoader = Callable[..., Loader]
WriteSet = Callable[..., ShardSet]


def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Each download that began: the shard, and whether the reader itself waited for it."""
    found: list[tuple[str, bool]] = []
    download = remote._download

    def noted(shard: RemoteShard, file: int, folder: Path) -> None:
        found.append((shard.url.rsplit("/", 1)[-1].split()[0], threading.current_thread() is threading.main_thread()))
        download(shard, file, folder)

    monkeypatch.setattr(remote, "_download", noted)
    return found


@pytest.fixture
def shards(write_set: WriteSet, tmp_path: Path) -> ShardSet:
    """Six shards of 4 records that a command prints, with an index."""
    local = write_set(samples=24, samples_per_shard=4)
    cache = CacheConfig(folder=str(tmp_path / "cache"), retries=0)
    return load_index(f"pipe:cat {local.root}/shard-{{000000..000005}}.tar", cache)


def names(order: EpochOrder, stream: int, block: int) -> list[str]:
    return [shard.name for _, shard in order.shards_of(stream, block)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_block_s_shards_are_those_of_its_records(shuffle: bool) -> None:
    sets = [ShardSet("/", "s", tuple(ShardInfo(f"{i}", n, 1) for i, n in enumerate((3, 8, 0, 5, 1, 9, 7))))]
    order = EpochOrder(sets, 0, 0, 3, 4, shuffle)
    for stream in range(3):
        for block in range(order.length(stream) // 4 + 1):
            places = range(block * 4, min(block * 4 + 4, order.length(stream)))
            read = {order.place(stream, j).shard.name for j in places}
            assert read <= set(names(order, stream, block))
            assert not shuffle or {n for n in names(order, stream, block) if n != "2"} == read
        assert names(order, stream, order.length(stream)) == []


def test_the_reader_waits_for_the_first_shard_alone(
    shards: ShardSet, make_loader: MakeLoader, fetched: list[tuple[str, bool]]
) -> None:
    """A step reads one shard. At its end the next shard is there, or on its way, before a record of it is asked for."""
    loader = make_loader(shards, streams=1, shuffle_block=4)
    order = EpochOrder([shards], 1, 0, 1, 4)
    turn = [names(order, 0, block)[0] for block in range(6)]
    steps = iter(loader.iterate(0))
    for number in range(6):
        next(steps)
        until(lambda: len(fetched) == min(number + 2, 6))  # noqa: B023
        assert {name for name, _ in fetched} == set(turn[: number + 2])  # the first two are asked for at once
    assert {name for name, waited in fetched if waited} <= {turn[0]}
    assert len(list(steps)) == 0


def test_without_room_for_the_next_ones_nothing_is_fetched_ahead(
    shards: ShardSet, make_loader: MakeLoader, fetched: list[tuple[str, bool]]
) -> None:
    largest = max(s.bytes for s in shards.shards)
    for room, ahead in ((4.2, False), (8.2, True)):  # of two shards a stream, as a block may lie in two
        tight = replace(
            shards, cache=replace(shards.cache, folder=f"{shards.cache.folder}{room}", gigabytes=room * largest / 1e9)
        )
        loader = make_loader(tight, streams=2, shuffle_block=4)
        fetched.clear()
        for _ in loader.iterate(0):
            held = sum(entry.stat().st_size for entry in os.scandir(str(tight.cache.folder)))
            assert held <= room * largest
        assert any(not waited for _, waited in fetched) == ahead
        assert loader.ahead == ahead


def test_the_batches_are_those_of_the_local_folder(shards: ShardSet, make_loader: MakeLoader) -> None:
    local = load_index(shards.root.split()[1])
    for settings in ({"streams": 3}, {"streams": 2, "shuffle_block": 9}, {"training": False}):
        pairs = zip(make_loader(shards, **settings).iterate(0), make_loader(local, **settings).iterate(0), strict=True)
        assert all(a.keys == b.keys and a.images.equal(b.images) for a, b in pairs)


def test_what_went_wrong_is_said_when_the_shard_is_read(
    shards: ShardSet, make_loader: MakeLoader, fetched: list[tuple[str, bool]]
) -> None:
    """Once: the reader does not try again what the background gave up."""
    lost = names(EpochOrder([shards], 1, 0, 1, 4), 0, 3)[0]
    (Path(shards.root.split()[1]) / lost).unlink()
    loader = make_loader(shards, streams=1, shuffle_block=4, max_bad_fraction=1.0)
    for number, batch in enumerate(loader.iterate(0)):
        if number < 5:
            until(lambda: len(fetched) == number + 2)  # noqa: B023
        assert batch.filled == ({"unreadable shard": 4} if number == 3 else {})
    assert [name for name, _ in fetched].count(lost) == 1


def test_a_cache_that_cannot_be_used_stops_the_reader(shards: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shard = RemoteShard(f"pipe:cat {tmp_path}/x.tar", 1, replace(shards.cache, folder=str(tmp_path / "file")))
    ahead = Prefetcher()
    ahead.want(shard)
    until(ahead._asked[shard].done)
    with pytest.raises(ConfigError, match="cannot be used"):
        ahead.wait(shard)
    ahead.close()


def test_what_waits_in_the_queue_is_the_reader_s(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, fetched: list[tuple[str, bool]]
) -> None:
    monkeypatch.setattr(prefetch, "FETCHERS", 1)
    ahead, gate, before = Prefetcher(), threading.Event(), threading.active_count()
    opened = RemoteShard.open
    monkeypatch.setattr(RemoteShard, "open", lambda self: (gate.wait(10), opened(self))[1])
    first, second, third = (RemoteShard(f"{shards.root}/{s.name}", s.bytes, shards.cache) for s in shards.shards[:3])
    for shard in (first, second, second, third):
        ahead.want(shard)
    until(ahead._asked[first].running)
    ahead.wait(second)
    assert fetched == [], "it did not wait for the first"
    ahead.close()
    gate.set()
    until(lambda: threading.active_count() == before)
    assert len(fetched) == 1, "what was given up is not begun"


def test_a_resampled_order_looks_ahead_too(shards: ShardSet) -> None:
    order = ResampledOrder([shards], 0, 0, 1, 40, 6)
    assert len(order.shards_of(0, 1)) == 1
    assert len({order.place(0, j).turn for j in range(6)}) == 2
    ahead = [shard for _, shard in order.shards_of(0, 1)]
    assert len(ahead) == 2
    assert set(ahead) == {order.place(0, j).shard for j in range(6, 12)}
    assert order.shards_of(0, 7) == []
