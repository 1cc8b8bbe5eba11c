"""DESIGN's contract of the order, as a property: over shards, mixtures, streams, ranks, workers and stop points."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.index import ShardInfo, ShardSet
from vlm.data.order import EpochOrder, Place, batch_places, epoch_samples, worker_places
from vlm.errors import ConfigError
from vlm.settings import config_from_dict
from vlm.settings_check import check

Seen = tuple[str, str, int, int]  # source, shard, number in it, pass
SIZES = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=3)
WEIGHT = st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 2.7])


def sets_of(sizes: list[list[int]]) -> list[ShardSet]:
    return [
        ShardSet(f"/{i}", f"s{i}", tuple(ShardInfo(f"{j}.tar", n, 1) for j, n in enumerate(part)))
        for i, part in enumerate(sizes)
    ]


def seen(place: Place) -> Seen:
    return (place.shards.source, place.shard.name, place.number, place.turn)


def sequence(order: EpochOrder) -> list[Seen]:
    return [seen(order.place(p % order.streams, p // order.streams)) for p in range(order.samples)]


@st.composite
def plans(draw: st.DrawFn) -> dict[str, object]:
    """Any sets, mixture, streams and batch that four ranks can share."""
    sizes = draw(SIZES)
    mixture = draw(st.just([]) | st.lists(WEIGHT, min_size=len(sizes), max_size=len(sizes)))
    counts = {"streams": 4 * draw(st.integers(1, 4)), "shuffle_block": draw(st.integers(1, 12))}
    place = {"seed": draw(st.integers(0, 2)), "epoch": draw(st.integers(0, 5))}
    return {"sets": sets_of(sizes), "mixture": mixture, **counts, **place}


@settings(max_examples=120, deadline=None)
@given(plan=plans(), batch_size=st.sampled_from([4, 8, 12]), data=st.data())
def test_the_same_batches_for_all_ranks_and_workers_from_any_step_on(
    plan: dict[str, object], batch_size: int, data: st.DataObject
) -> None:
    """Every reader knows nothing but the plan and the step to begin at: what the readers before it did is not told."""
    want = sequence(EpochOrder(**plan))  # type: ignore[arg-type]
    steps = len(want) // batch_size
    start = data.draw(st.integers(0, steps))
    for world in (1, 2, 4):
        for workers in (1, 3):  # 0 workers are one reader, the process itself
            parts: dict[int, list[tuple[int, Seen]]] = {step: [] for step in range(start, steps)}
            for rank in range(world):
                taken: Counter[int] = Counter()
                for worker in range(workers):
                    order = EpochOrder(**plan)  # type: ignore[arg-type]
                    for step in range(start, steps):
                        places = batch_places(step, batch_size, order.samples, rank, world)
                        for p in worker_places(places, order.streams, worker, workers, world):
                            parts[step].append((p, seen(order.place(p % order.streams, p // order.streams))))
                            taken[step] += 1
                # as many steps on every rank, each with its equal part
                assert taken == dict.fromkeys(range(start, steps), batch_size // world)
            for step, found in parts.items():
                assert [s for _, s in sorted(found)] == want[step * batch_size : (step + 1) * batch_size]


@settings(max_examples=120, deadline=None)
@given(sizes=SIZES, streams=st.integers(1, 9), block=st.integers(1, 12), data=st.data())
def test_each_record_once_in_each_pass_over_its_set(
    sizes: list[list[int]], streams: int, block: int, data: st.DataObject
) -> None:
    """Without a mixture an epoch is a pass; with one, weight x records of each set in every epoch, pass after pass."""
    sets = sets_of(sizes)
    mixture = data.draw(st.just([]) | st.lists(WEIGHT, min_size=len(sizes), max_size=len(sizes)))
    counts = epoch_samples(sets, mixture)
    epochs = [sequence(EpochOrder(sets, 1, epoch, streams, block, mixture=mixture)) for epoch in range(4)]
    for i, (shards, count) in enumerate(zip(sets, counts, strict=True)):
        assert [sum(s[0] == f"s{i}" for s in epoch) for epoch in epochs] == [count] * 4
        weight = mixture[i] if mixture else 1.0
        assert abs(count - weight * shards.samples) <= (0.5 if count > 1 else 1)
        records = {(shard.name, k) for shard in shards.shards for k in range(shard.samples)}
        read = [s[1:] for epoch in epochs for s in epoch if s[0] == f"s{i}"]
        assert len(set(read)) == len(read)  # no record twice in one pass
        for turn in range(4 * count // len(records) if records else 0):
            assert {(name, k) for name, k, t in read if t == turn} == records
        turns = [{s[3] for s in epoch if s[0] == f"s{i}"} for epoch in epochs if count]
        assert all(max(a) <= min(b) for a, b in pairwise(turns))  # one pass ends before the next
    if not mixture:
        assert all({s[3] for s in epoch} <= {number} for number, epoch in enumerate(epochs))


def test_half_of_a_set_is_another_half_in_the_next_epoch() -> None:
    sets = sets_of([[4, 4, 4, 4], [6]])
    first, second, third = (
        {s[1:3] for s in sequence(EpochOrder(sets, 0, e, 2, 5, mixture=[0.5, 2.0])) if s[0] == "s0"} for e in range(3)
    )
    assert len(first) == len(second) == 8
    assert first | second == {(f"{j}.tar", k) for j in range(4) for k in range(4)}
    assert third not in (first, second)  # each pass is cut elsewhere
    twice = Counter(s[1:3] for s in sequence(EpochOrder(sets, 0, 0, 2, 5, mixture=[0.5, 2.0])) if s[0] == "s1")
    assert set(twice.values()) == {2}


def test_a_mixture_of_ones_is_none() -> None:
    sets = sets_of([[3, 0, 7], [5]])
    for epoch in range(3):
        assert sequence(EpochOrder(sets, 0, epoch, 3, 4, mixture=[1.0, 1.0])) == sequence(
            EpochOrder(sets, 0, epoch, 3, 4)
        )


def test_first_batches_mix_the_sets_by_their_weights_within_three_sigma() -> None:
    """Of 1,000, 500 and 250 records weighted 1, 0.5 and 4: 1,000, 250 and 1,000 an epoch. One sample of each of 64 streams, over 100 epochs."""
    sets = sets_of([[5] * 200, [5] * 100, [5] * 50])
    batches = 100
    counts: Counter[str] = Counter()
    for epoch in range(batches):
        order = EpochOrder(sets, 3, epoch, 64, 10, mixture=[1.0, 0.5, 4.0])
        assert order.samples == 2250
        counts.update(seen(order.place(p % 64, p // 64))[0] for p in range(64))
    drawn = 64 * batches
    for source, records in (("s0", 1000), ("s1", 250), ("s2", 1000)):
        share = records / 2250
        assert abs(counts[source] - drawn * share) < 3 * (drawn * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("mixture", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, 1.0, 1.0]])
def test_weights_that_do_not_fit_are_refused(mixture: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected 2 weights above 0, one for each set"):
        epoch_samples(sets_of([[3], [4]]), mixture)


def test_planning_holds_no_more_than_the_shards_and_a_block_of_each_stream_read() -> None:
    """A rank of 512, somewhere in an epoch of 3 x 10^9 records: one block of each of its streams, of streams that are not its own none."""
    order = EpochOrder([ShardSet("/", "s", tuple(ShardInfo(f"{i}.tar", 10**6, 1) for i in range(3000)))], 0, 0, 4096)
    for step in (10_000, 10_001):
        for p in batch_places(step, 8192, order.samples, 7, 512):
            order.place(p % order.streams, p // order.streams)
    assert len(order._blocks) == 8
    assert all(len(permutation) == 1000 for _, permutation in order._blocks.values())


@pytest.mark.parametrize(
    ("mixture", "reason"),
    [([2.0], "has 1 weights, data.splits.train 2 folders"), ([1.0, 0.0], "expected passes an epoch above 0")],
)
def test_settings_of_a_mixture_that_does_not_fit_are_refused(mixture: list[float], reason: str) -> None:
    values = {"data": {"splits": {"train": ["a", "b"]}, "mixture": mixture}}
    with pytest.raises(ConfigError, match=reason):
        check(config_from_dict(values, "test"))
    check(config_from_dict({"data": {**values["data"], "mixture": [2, 0.5]}}, "test"))
