"""Bad samples change neither shapes, steps nor position; they are counted, and too many stop the work with a clear line."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.data.batch import Batch
from vlm.data.loader import Loader
from vlm.data.order import EpochOrder
from vlm.data.shards import ShardSet, load_index
from vlm.errors import ConfigError, UserError

MakeLoader = Callable[..., Loader]
BAD: dict[str, dict[str, bytes]] = {
    "undecodable image": {"jpg": b"no image", "txt": b"text"},
    "no image": {"txt": b"text"},
    "no text": {"jpg": b"img"},
    "broken json": {"jpg": b"img", "json": b'{"captions": ["cut'},
    "not UTF-8": {"jpg": b"img", "txt": b"caf\xe9"},
}


@pytest.fixture
def faulty_set(tmp_path: Path, write_tar: Callable[..., None]) -> Callable[..., ShardSet]:
    """faulty_set({number: cause}, samples): records k000.. of which the named ones are bad; "missing" cuts the last shard at that record."""

    def write(bad: dict[int, str], samples: int = 40, per_shard: int = 10) -> ShardSet:
        folder = tmp_path / "toy"
        shards = []
        for first in range(0, samples, per_shard):
            members: dict[str, bytes] = {}
            for i in range(first, min(first + per_shard, samples)):
                good = {"jpg": b"img%d" % i, "txt": f"caption {i}".encode()}
                members |= {f"k{i:03d}.{e}": data for e, data in BAD.get(bad.get(i, ""), good).items()}
            path = folder / f"{first:04d}.tar"
            write_tar(path, members)
            shards.append({"name": path.name, "samples": min(per_shard, samples - first), "bytes": path.stat().st_size})
        (folder / "index.json").write_text(json.dumps({"source": "toy", "shards": shards, "samples": samples}))
        for i, cause in bad.items():
            if cause == "missing":  # two members of 1024 bytes a record: cut inside the image
                os.truncate(folder / f"{i // per_shard * per_shard:04d}.tar", i % per_shard * 2048 + 514)
        return load_index(folder)

    return write


def shapes(batch: Batch) -> tuple[Any, ...]:
    return tuple(batch.images.shape), len(batch.keys), len(batch.texts.weight), len(batch.sources)


def content(batches: list[Batch]) -> list[tuple[Any, ...]]:
    return [(b.keys, b.images.tolist(), b.texts.weight.tolist(), b.image_ids.tolist(), b.filled) for b in batches]


SOME = {0: "undecodable image", 1: "no image", 9: "no text", 17: "broken json", 25: "not UTF-8", 36: "missing"}
SOME_COUNTS = {"undecodable image": 1, "no image": 1, "no text": 1, "broken json": 1, "not UTF-8": 1, "missing": 4}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_keeps_steps_and_shapes_and_is_counted(
    faulty_set: Callable[..., ShardSet], make_loader: MakeLoader, workers: int
) -> None:
    loader = make_loader(faulty_set(SOME), batch_size=8, workers=workers)
    batches = list(loader.iterate(0))
    assert len(batches) == loader.steps == 5
    assert {shapes(b) for b in batches} == {((8, 3, 4, 4), 8, 8, 8)}
    assert dict(sum((Counter(b.filled) for b in batches), Counter())) == SOME_COUNTS == dict(loader.bad)
    for batch in batches:
        weights = batch.texts.weight.tolist()
        assert weights.count(0.0) == sum(batch.filled.values())
        assert batch.masked is not None
        assert batch.answers is not None
        assert len(batch.masked.labels) == 8 - weights.count(0.0)
        assert batch.answers.weight.tolist() == weights


def test_each_epoch_counts_its_own(faulty_set: Callable[..., ShardSet], make_loader: MakeLoader) -> None:
    loader = make_loader(faulty_set(SOME), batch_size=8)
    for number in range(3):
        batches = list(loader.iterate(number))
        assert dict(loader.bad) == SOME_COUNTS
        assert sum((Counter(b.filled) for b in batches), Counter()) == loader.bad


def test_the_preceding_good_sample_may_lie_far_back(
    faulty_set: Callable[..., ShardSet], make_loader: MakeLoader
) -> None:
    """Also where reading begins behind it, so that nothing holds it yet and there is a good one nearer ahead."""
    bad = dict.fromkeys(set(range(1, 90)) - {75}, "no text")
    settings = {"streams": 1, "shuffle_block": 1, "batch_size": 1, "max_bad_fraction": 1.0}
    loader = make_loader(faulty_set(bad, samples=90, per_shard=90), **settings)
    assert next(loader.iterate(0, 70)).keys == ["k000"]


def test_a_slot_is_filled_by_the_preceding_good_sample_of_its_stream(
    faulty_set: Callable[..., ShardSet], make_loader: MakeLoader
) -> None:
    loader = make_loader(faulty_set(SOME), batch_size=8)
    order = EpochOrder(loader.sets, loader.seed, 0, 4, 3)
    missing = [36, 37, 38, 39]
    bad = {*SOME, *missing}

    def record(stream: int, j: int) -> int:
        place = order.place(stream, j)
        return int(place.shard.name[:4]) + place.number

    flat = [
        (k, w, i)
        for b in loader.iterate(0)
        for k, w, i in zip(b.keys, b.texts.weight.tolist(), b.image_ids.tolist(), strict=True)
    ]
    for p, (key, weight, image_id) in enumerate(flat):
        stream, j = p % 4, p // 4
        own = record(stream, j)
        assert weight == (own not in bad)
        line = [*range(j, -1, -1), *range(j + 1, order.length(stream))]
        want = next(record(stream, i) for i in line if record(stream, i) not in bad)
        assert key == f"k{want:03d}"
        assert image_id == next(i for k, w, i in flat if k == key and w == 1.0)


def test_resuming_fills_the_same(faulty_set: Callable[..., ShardSet], make_loader: MakeLoader) -> None:
    loader = make_loader(faulty_set(SOME))
    whole = content(list(loader.iterate(0)))
    for start in range(1, loader.steps):
        assert content(list(loader.iterate(0, start))) == whole[start:]


def test_ranks_fill_the_same(faulty_set: Callable[..., ShardSet], make_loader: MakeLoader) -> None:
    shards = faulty_set(SOME)
    whole = [key for b in make_loader(shards).iterate(0) for key in b.keys]
    parts = [[key for b in make_loader(shards, rank=r, world=2).iterate(0) for key in b.keys] for r in range(2)]
    assert [key for pair in zip(*parts, strict=True) for key in pair] == whole


def test_a_stream_without_any_good_sample_borrows_from_the_next(
    faulty_set: Callable[..., ShardSet], make_loader: MakeLoader
) -> None:
    loader = make_loader(faulty_set({1: "no image"}, samples=4), streams=4, batch_size=4)
    (batch,) = loader.iterate(0)
    assert sorted(batch.texts.weight.tolist()) == [0.0, 1.0, 1.0, 1.0]
    assert batch.filled == {"no image": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_bad_samples_out(
    faulty_set: Callable[..., ShardSet], make_loader: MakeLoader, workers: int
) -> None:
    loader = make_loader(faulty_set(SOME), training=False, batch_size=8, workers=workers)
    batches = list(loader.iterate(0))
    bad = {*SOME, 36, 37, 38, 39}
    assert [k for b in batches for k in b.keys] == [f"k{i:03d}" for i in range(40) if i not in bad]
    assert all(b.texts.weight.min() == 1 for b in batches)
    assert dict(loader.bad) == SOME_COUNTS
    assert batches[0].filled == {"undecodable image": 1, "no image": 1}


def test_an_evaluation_without_one_good_sample_is_refused(
    faulty_set: Callable[..., ShardSet], make_loader: MakeLoader
) -> None:
    loader = make_loader(faulty_set(dict.fromkeys(range(6), "no text"), samples=6), training=False)
    with pytest.raises(UserError, match=r"6 of 6 samples cannot be used \(6 x no text\)"):
        list(loader.iterate(0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_with_counts_and_an_example(
    faulty_set: Callable[..., ShardSet], make_loader: MakeLoader, training: bool, workers: int
) -> None:
    bad = {i: "no text" if i % 2 else "undecodable image" for i in range(0, 200, 5)}
    loader = make_loader(faulty_set(bad, samples=200), training=training, workers=workers)
    with pytest.raises(UserError, match=r"max_bad_fraction=0.1. For example: .*toy/k\d{3}") as caught:
        list(loader.iterate(0))
    found = re.match(r"(\d+) of (\d+) samples cannot be used \((\d+) x [\w ]+, (\d+) x", str(caught.value))
    assert found is not None
    count, of, first, second = map(int, found.groups())
    assert count == first + second
    assert 100 <= of < 108
    tolerant = make_loader(*loader.sets, training=training, max_bad_fraction=0.3)
    assert sum(1 for _ in tolerant.iterate(0)) == 50


def test_data_of_another_kind_stops_soon(faulty_set: Callable[..., ShardSet], make_loader: MakeLoader) -> None:
    loader = make_loader(faulty_set(dict.fromkeys(range(300), "no text"), samples=300))
    with pytest.raises(UserError, match=r"201 samples were tried and none can be used \(201 x no text\)"):
        list(loader.iterate(0))


@pytest.mark.parametrize("method", ["texts", "sample"])
@pytest.mark.parametrize(
    ("raised", "want"), [(ConfigError("wrong setting"), ConfigError), (ZeroDivisionError(), ZeroDivisionError)]
)
def test_mistakes_are_no_bad_samples(
    faulty_set: Callable[..., ShardSet],
    make_loader: MakeLoader,
    raised: Exception,
    want: type[Exception],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(*_: object) -> None:
        raise raised

    loader = make_loader(faulty_set({}))
    monkeypatch.setattr(type(loader.encode), method, wrong)
    with pytest.raises(want):
        list(loader.iterate(0))


def test_a_stop_request_to_the_whole_group_leaves_the_workers_reading(
    faulty_set: Callable[..., ShardSet], make_loader: MakeLoader
) -> None:
    loader = make_loader(faulty_set({}), workers=1)
    batches = loader.iterate(0)
    first = next(batches)
    (worker,) = multiprocessing.active_children()
    stop = f"import os, signal\nfor s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): os.kill({worker.pid}, s)"
    subprocess.run([sys.executable, "-c", stop], check=True)
    assert len([first, *batches]) == loader.steps
    # the main process itself can end it
    batches = loader.iterate(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0
