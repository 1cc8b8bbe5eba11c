"""The epoch's order is a permutation, cut as documented, and depends on nothing but its arguments."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.config import Config, DataConfig
from vlm.data.index import ShardInfo, ShardSet
from vlm.data.order import EpochOrder, automatic_streams, batch_places, check_split
from vlm.data.random import keyed_generator, keyed_random, keyed_seed
from vlm.errors import ConfigError
from vlm.order_settings import as_begun, streams_of
from vlm.settings import config_to_yaml


def sets_of(*sizes: list[int]) -> list[ShardSet]:
    return [
        ShardSet(f"/{i}", f"s{i}", tuple(ShardInfo(f"{j}.tar", n, 1) for j, n in enumerate(part)))
        for i, part in enumerate(sizes)
    ]


def sequence(order: EpochOrder) -> list[tuple[str, str, int]]:
    places = [order.place(p % order.streams, p // order.streams) for p in range(order.samples)]
    return [(place.shards.source, place.shard.name, place.number) for place in places]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    streams=st.integers(1, 9),
    block=st.integers(1, 12),
    shuffle=st.booleans(),
)
def test_every_record_stands_once_in_the_global_sequence(
    sizes: list[list[int]], streams: int, block: int, shuffle: bool
) -> None:
    order = EpochOrder(sets_of(*sizes), 3, 0, streams, block, shuffle)
    want = [(f"s{i}", f"{j}.tar", k) for i, part in enumerate(sizes) for j, n in enumerate(part) for k in range(n)]
    got = sequence(order)
    assert sorted(got) == want
    assert sum(order.length(s) for s in range(streams)) == order.samples
    if not shuffle:
        assert got == want


def test_order_is_a_function_of_seed_and_epoch() -> None:
    sets = sets_of([7, 30], [13])
    base = sequence(EpochOrder(sets, 1, 0, 4, 10))
    assert sequence(EpochOrder(sets, 1, 0, 4, 10)) == base
    assert sequence(EpochOrder(sets, 1, 1, 4, 10)) != base
    assert sequence(EpochOrder(sets, 2, 0, 4, 10)) != base


def test_order_has_not_changed() -> None:
    """Golden: a saved run is resumed in the order that it was started in, also by a later version."""
    got = sequence(EpochOrder(sets_of([3], [4]), 0, 0, 2, 4))
    assert [f"{source}:{number}" for source, _, number in got] == [
        "s1:0",
        "s1:1",
        "s0:1",
        "s1:2",
        "s0:2",
        "s1:3",
        "s0:0",
    ]


def test_order_has_not_changed_where_shards_are_empty() -> None:
    """Golden: shards without a record are permuted with the others."""
    got = sequence(EpochOrder(sets_of([2, 0, 2, 0, 2], [0, 2, 2]), 0, 0, 2, 4))
    told = " ".join(f"{source[1]}{shard[0]}{number}" for source, shard, number in got)  # set, shard, record
    assert told == "111 041 021 040 110 000 020 121 120 001"


def test_reading_a_stream_backwards_gives_the_same_places() -> None:
    order = EpochOrder(sets_of([25]), 0, 0, 2, 4)
    forward = [order.place(1, j) for j in range(order.length(1))]
    assert [order.place(1, j) for j in reversed(range(order.length(1)))] == forward[::-1]


def test_streams_are_contiguous_and_blocks_stay_in_place() -> None:
    order = EpochOrder(sets_of([23]), 0, 0, 2, 5)  # streams of 12 and 11 records
    numbers = [[order.place(s, j).number for j in range(order.length(s))] for s in (0, 1)]
    assert [len(n) for n in numbers] == [12, 11]
    assert sorted(numbers[0]) == list(range(12))
    assert sorted(numbers[0][:5]) == [0, 1, 2, 3, 4]
    assert numbers[0][:5] != [0, 1, 2, 3, 4] or numbers[0][5:10] != [5, 6, 7, 8, 9]
    assert sorted(numbers[1][10:]) == [22]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_take_equal_parts_of_every_batch_from_their_own_streams(world: int) -> None:
    streams, batch_size, samples = 8, 12, 50
    for step in range(samples // batch_size):
        parts = [batch_places(step, batch_size, samples, rank, world) for rank in range(world)]
        assert [len(part) for part in parts] == [batch_size // world] * world
        assert sorted(p for part in parts for p in part) == list(range(step * batch_size, (step + 1) * batch_size))
        assert all(p % streams % world == rank for rank, part in enumerate(parts) for p in part)


def test_settings_that_cannot_be_split_name_the_nearest_choices() -> None:
    with pytest.raises(ConfigError, match="streams=64 cannot be divided over 3 ranks; use 63 or 66"):
        check_split(64, 6, 3)
    with pytest.raises(ConfigError, match="batch_size=2 cannot be divided over 4 ranks; use 4"):
        check_split(64, 2, 4)
    with pytest.raises(ConfigError, match="batch_size=0"):
        check_split(64, 0, 1)
    with pytest.raises(ConfigError, match="shuffle_block=0"):
        EpochOrder(sets_of([3]), 0, 0, 1, 0)


def test_keyed_seeds_depend_on_every_part() -> None:
    parts = (1, 2, "coco", "a", "crop")
    seeds = {keyed_seed(*parts[:i], "other", *parts[i + 1 :]) for i in range(5)} | {keyed_seed(*parts)}
    assert len(seeds) == 6
    assert len({keyed_seed(1, 23), keyed_seed(12, 3), keyed_seed("1", 23), keyed_seed(1, "2", 3)}) == 4
    assert keyed_seed(0, 0, "toy", "k", "crop") == 9852492082471641180
    first, second = (torch.rand(3, generator=keyed_generator(*parts)) for _ in range(2))
    assert torch.equal(first, second)


def test_keyed_random_leaves_the_global_generator_as_it_was() -> None:
    torch.manual_seed(0)
    want = torch.rand(2)
    torch.manual_seed(0)
    with keyed_random(5, "crop"):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), want)
    assert torch.equal(inside, torch.rand(2, generator=keyed_generator(5, "crop")))
    with pytest.raises(RuntimeError), keyed_random(5):
        raise RuntimeError
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), want)


@pytest.mark.parametrize("batch_size", [1, 3, 48, 64, 65, 96, 256, 4096])
def test_the_automatic_streams_are_shared_by_all_ranks_that_share_a_batch(batch_size: int) -> None:
    """And every batch takes as many records of each stream, or one of each of a part that is as large as the others'."""
    streams = automatic_streams(batch_size, remote=False)
    assert 64 <= streams < max(65, batch_size + 64)
    for world in range(1, batch_size + 1):
        if batch_size % world == 0:
            check_split(streams, batch_size, world)
    assert automatic_streams(batch_size, remote=True) == 64


def test_a_run_goes_on_with_the_streams_that_it_began_with(tmp_path: Path) -> None:
    config = Config(data=DataConfig(batch_size=256))
    assert streams_of(as_begun(config, tmp_path).data, []) == 256
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert streams_of(as_begun(config, tmp_path).data, []) == 256
    (tmp_path / "config.yaml").write_text(config_to_yaml(Config(data=DataConfig(batch_size=256, streams=64))))
    assert streams_of(as_begun(config, tmp_path).data, []) == 64
    asked = Config(data=DataConfig(batch_size=256, streams=128))
    assert streams_of(as_begun(asked, tmp_path).data, []) == 128
    remote = ShardSet("https://host", "s", ())
    assert streams_of(config.data, [remote]) == 64
