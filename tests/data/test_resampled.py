"""Shards that nobody counted, drawn with replacement: the same batches for all ranks, workers and stops; bad ones are counted."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.build import load_sets
from vlm.config import CacheConfig
from vlm.data.index import ShardSet, list_shards
from vlm.data.loader import Loader
from vlm.data.resampled import ResampledOrder
from vlm.data.scan import scan
from vlm.errors import ConfigError, UserError
from vlm.held_out import training_images
from vlm.settings import config_from_dict
from vlm.settings_check import check

MakeLoader = Callable[..., Loader]
WriteSet = Callable[..., ShardSet]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def uncounted(write_set: WriteSet, tmp_path: Path) -> ShardSet:
    """Shards of 6, 6, 6 and 2 records that a command prints; there is no index."""
    local = write_set()
    (Path(local.root) / "index.json").unlink()
    pattern = f"pipe:cat {local.root}/shard-{{000000..000003}}.tar"
    return list_shards(pattern, CacheConfig(folder=str(tmp_path / "cache"), retries=0))


def content(batches: Any) -> list[tuple[Any, ...]]:
    return [(b.keys, b.images.tolist(), b.texts.ids.tolist(), b.texts.weight.tolist(), b.filled) for b in batches]


def test_they_are_taken_as_the_pattern_names_them(uncounted: ShardSet, write_set: WriteSet) -> None:
    assert [(s.name, s.samples) for s in uncounted.shards] == [(f"shard-{i:06d}.tar", 0) for i in range(4)]
    assert not uncounted.counted
    counted = write_set("counted")
    assert list_shards(counted.root) == counted
    with pytest.raises(UserError, match="remote shards need one"):
        list_shards("memory://bucket/without/pattern")
    assert load_sets([counted.root], "data.splits.train", order="resampled") == [counted]


def test_the_same_batches_for_ranks_workers_and_stops(
    uncounted: ShardSet, make_loader: MakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    def loader(**settings: int) -> Loader:
        return make_loader(uncounted, declared=50, shuffle_block=7, **settings)

    whole = loader()
    assert (whole.samples, whole.steps) == (50, 12)
    assert "nothing promises that a record is read exactly once" in caplog.text
    assert "are not looked for" in caplog.text
    want = content(whole.iterate(2))
    assert len(want) == 12
    assert content(loader(workers=2).iterate(2, 3)) == want[3:]
    assert content(loader().iterate(2, 11)) == want[11:]
    parts = [[b.keys for b in loader(world=2, rank=rank).iterate(2, 5)] for rank in range(2)]
    for (keys, *_), pair in zip(want[5:], zip(*parts, strict=True), strict=True):
        assert [key for both in zip(*pair, strict=True) for key in both] == keys
    assert caplog.text.count("nothing promises") == 4, "once a run, not once a rank"
    assert [keys for keys, *_ in content(whole.iterate(3))] != [keys for keys, *_ in want]
    assert [keys for keys, *_ in content(make_loader(uncounted, declared=50, seed=2).iterate(2))] != [
        k for k, *_ in want
    ]


def test_a_resumption_reads_the_shards_of_its_own_block_alone(
    uncounted: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    order = ResampledOrder([uncounted], 0, 0, 2, 4000, 10)
    count = order.reader.count
    monkeypatch.setattr(order.reader, "count", lambda shard: opened.append(str(shard)) or count(shard))
    places = [order.place(1, j) for j in range(1990, 2000)]
    assert 2 <= len(opened) <= 5  # of 10 records, in shards of 6 and 2
    assert {place.shards.locate(place.shard).url for place in places} == set(opened)  # type: ignore[union-attr]
    for key in {place.turn for place in places}:
        records = [(place.shard.name, place.number) for place in places if place.turn == key]
        assert len(set(records)) == len(records), "a draw has each record of its shard once"


def test_each_record_is_drawn_as_often_as_any_other_and_mixtures_weigh_them(write_set: WriteSet) -> None:
    first, second = write_set("first", 40, 10), write_set("second", 20, 10)
    for mixture, share in (([], 2 / 3), ([1.0, 4.0], 1 / 3)):
        order = ResampledOrder([first, second], 1, 0, 4, 20_000, 10, mixture)
        seen: Counter[tuple[str, str, int]] = Counter()
        for p in range(order.samples):
            place = order.place(p % 4, p // 4)
            seen[place.shards.source, place.shard.name, place.number] += 1
        assert len(seen) == 60
        drawn = sum(n for (source, *_), n in seen.items() if source == "first")
        # 2,000 draws of 10 records
        assert abs(drawn / 10 - 2000 * share) < 3.5 * (2000 * share * (1 - share)) ** 0.5
    with pytest.raises(ConfigError, match="expected 2 weights above 0"):
        ResampledOrder([first, second], 1, 0, 4, 100, 10, [1.0])


def test_each_draw_of_a_shard_takes_other_records(write_set: WriteSet) -> None:
    """Of a shard that a block has no room for: neither the same in every stream nor in every block."""
    order = ResampledOrder([write_set("large", 200, 200)], 0, 0, 8, 8 * 30, 3)
    taken = {(s, b): frozenset(order.place(s, 3 * b + i).number for i in range(3)) for s in range(8) for b in range(10)}
    assert all(len(records) == 3 for records in taken.values())
    assert len(set(taken.values())) == len(taken)


def test_a_second_draw_of_a_record_is_augmented_anew(uncounted: ShardSet, make_loader: MakeLoader) -> None:
    images: dict[str, set[str]] = {}
    for batch in make_loader(uncounted, declared=120).iterate(0):
        for key, image in zip(batch.keys, batch.images, strict=True):
            images.setdefault(key, set()).add(str(image.tolist()))
    assert max(len(several) for several in images.values()) > 2


def test_bad_records_and_shards_are_counted_and_nothing_shifts(
    uncounted: ShardSet, make_loader: MakeLoader, tmp_path: Path
) -> None:
    (tmp_path / "toy/shard-000003.tar").unlink()
    tar = tmp_path / "toy/shard-000001.tar"
    tar.write_bytes(tar.read_bytes().replace(b"img7", b"bad7"))
    loader = make_loader(uncounted, declared=200, max_bad_fraction=1.0)
    batches = content(loader.iterate(0))
    assert len(batches) == 50
    assert set(loader.bad) == {"unreadable shard", "undecodable image"}
    assert sum(weights.count(0.0) for *_, weights, _ in batches) == loader.bad.total()
    assert content(make_loader(uncounted, declared=200, max_bad_fraction=1.0).iterate(0, 20)) == batches[20:]
    for tar in (tmp_path / "toy").glob("*.tar"):
        tar.unlink()
    for copy in (tmp_path / "cache").iterdir():
        copy.unlink()
    with pytest.raises(UserError, match=r"samples were tried and none can be used.*unreadable shard"):
        list(make_loader(uncounted, declared=200).iterate(0))


def test_what_needs_every_record_refuses_them(uncounted: ShardSet) -> None:
    with pytest.raises(ConfigError, match=r"has no index.*give tokenizer.source or init_from"):
        list(scan([uncounted]))
    assert training_images([uncounted], None) is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"order": "resampled"}, "data.order=resampled with data.epoch_samples=None"),
        ({"order": "resampled", "epoch_samples": 0}, "data.epoch_samples=0"),
        ({"epoch_samples": 100}, "data.epoch_samples=100, but data.order=exact"),
        ({"streams": 0}, "data.streams=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(config_from_dict({"data": values}, "test"))
    check(config_from_dict({"data": {"order": "resampled", "epoch_samples": 100}}, "test"))
