"""Batches are a function of the configuration and the seed: not of ranks, workers, or where reading began."""

import multiprocessing
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pytest
import torch

from vlm.data.batch import Batch
from vlm.data.collate import EncodedSample, EncodedText, collate
from vlm.data.loader import Loader
from vlm.data.records import ShardReader
from vlm.data.scan import image_ids
from vlm.data.shards import ShardSet
from vlm.errors import ConfigError, UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose

MakeLoader = Callable[..., Loader]
WriteSet = Callable[..., ShardSet]


def rows(batch: Batch) -> list[tuple[Any, ...]]:
    """Everything about each sample of a batch (one text each), free of padding."""
    assert batch.answers is not None
    assert batch.masked is not None
    length = batch.texts.ids.shape[1]
    found = []
    for i, key in enumerate(batch.keys):
        here = batch.masked.positions // length == i
        found.append(
            (
                key,
                batch.image_ids[i].item(),
                batch.images[i].flatten().tolist(),
                batch.texts.ids[i][batch.texts.mask[i]].tolist(),
                batch.texts.weight[i].item(),
                (batch.masked.positions[here] % length).tolist(),
                batch.masked.labels[here].tolist(),
                batch.answers.weight[batch.answers.text == i].tolist(),
                batch.sources[i],
            )
        )
    return found


def epoch(loader: Loader, number: int = 0, start: int = 0) -> list[list[tuple[Any, ...]]]:
    return [rows(batch) for batch in loader.iterate(number, start)]


def joined(parts: Sequence[list[list[tuple[Any, ...]]]]) -> list[list[tuple[Any, ...]]]:
    """The global batches of the ranks' parts: the ranks take places in turn."""
    return [[part[i] for i in range(len(step[0])) for part in step] for step in zip(*parts, strict=True)]


def keys(batches: list[list[tuple[Any, ...]]]) -> list[str]:
    return [row[0] for batch in batches for row in batch]


def test_batches_are_the_same_for_every_number_of_ranks_and_workers(
    write_set: WriteSet, make_loader: MakeLoader
) -> None:
    sets = write_set("a", samples=23, samples_per_shard=5), write_set("b", samples=14, samples_per_shard=20)
    want = epoch(make_loader(*sets, batch_size=8, streams=8), 2)
    assert len(want) == 37 // 8
    for world, workers in [(2, 0), (4, 0), (1, 1), (1, 3), (2, 3), (4, 5)]:
        loaders = [
            make_loader(*sets, batch_size=8, streams=8, world=world, rank=r, workers=workers) for r in range(world)
        ]
        assert {loader.steps for loader in loaders} == {37 // 8}
        assert joined([epoch(loader, 2) for loader in loaders]) == want


@pytest.mark.parametrize("samples", [24, 27])
def test_each_record_once_an_epoch_and_a_new_order_each(
    write_set: WriteSet, make_loader: MakeLoader, samples: int
) -> None:
    loader = make_loader(write_set(samples=samples, samples_per_shard=10))
    first, again, second = epoch(loader), epoch(loader), epoch(loader, 1)
    assert first == again
    assert loader.steps == len(first) == len(second) == samples // 4
    assert len(set(keys(first))) == len(keys(first)) == samples // 4 * 4
    assert keys(first) != keys(second)
    # what happens to a sample is drawn anew each epoch
    images = {row[0]: row[2] for batch in first for row in batch}
    assert all(images[row[0]] != row[2] for batch in second for row in batch if row[0] in images)
    assert keys(epoch(make_loader(*loader.sets, seed=2))) != keys(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_gives_exactly_the_rest(write_set: WriteSet, make_loader: MakeLoader, workers: int) -> None:
    loader = make_loader(write_set(samples=26), workers=workers)
    whole = epoch(make_loader(*loader.sets))
    for start in range(loader.steps + 1) if workers == 0 else [2]:
        assert epoch(loader, 0, start) == whole[start:]
        for stop in range(start, loader.steps + 1, 2):
            assert [rows(batch) for batch in loader.iterate(0, start, stop)] == whole[start:stop]
    with pytest.raises(ValueError, match=r"start_step=7 and stop_step=6; expected 0\.\.6"):
        next(loader.iterate(0, 7))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 0), (3, 0), (2, 2)])
def test_evaluation_covers_each_record_once_in_the_order_of_the_files(
    write_set: WriteSet, make_loader: MakeLoader, world: int, workers: int
) -> None:
    shards = write_set(samples=17)
    loaders = [make_loader(shards, training=False, world=world, rank=r, workers=workers) for r in range(world)]
    assert {loader.steps for loader in loaders} == {5}
    parts = [keys(epoch(loader)) for loader in loaders]
    assert [part for part in parts if part] == [[f"k{i:03d}" for i in range(r, 17, world)] for r in range(world)]
    if world == 1:
        assert [len(batch) for batch in epoch(loaders[0])] == [4, 4, 4, 4, 1]


def test_fewer_records_than_streams(write_set: WriteSet, make_loader: MakeLoader) -> None:
    loader = make_loader(write_set(samples=5, samples_per_shard=2), streams=64, workers=2)
    assert len(set(keys(epoch(loader)))) == 4


def test_the_global_generator_is_not_touched(write_set: WriteSet, make_loader: MakeLoader) -> None:
    shards = write_set(samples=8)
    for workers in (0, 1):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        epoch(make_loader(shards, workers=workers))
        assert torch.equal(torch.get_rng_state(), before)


def test_leaving_an_epoch_early_ends_its_workers(write_set: WriteSet, make_loader: MakeLoader) -> None:
    loader = make_loader(write_set(samples=40), workers=2)
    batches = loader.iterate(0)
    assert len(list(islice(batches, 2))) == 2
    assert len(multiprocessing.active_children()) == 2
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_settings_that_cannot_work_say_so(write_set: WriteSet, make_loader: MakeLoader) -> None:
    shards = write_set(samples=8)
    with pytest.raises(UserError, match="8 samples, expected batch_size=12; use a smaller batch"):
        make_loader(shards, batch_size=12)
    assert make_loader(shards, batch_size=12, training=False).steps == 1
    with pytest.raises(UserError, match="0 samples, expected at least one"):
        make_loader()
    with pytest.raises(ConfigError, match="streams=4 cannot be divided over 3 ranks; use 3 or 6"):
        make_loader(shards, batch_size=6, world=3)


def test_collate_joins_several_texts_and_answers() -> None:
    def sample(key: str, *texts: EncodedText) -> EncodedSample:
        return EncodedSample(key, hash(key), torch.full((3, 2, 2), ord(key), dtype=torch.uint8), list(texts))

    batch = collate(
        [
            sample(
                "a",
                EncodedText([2, 5, 3], answers=[([2, 7, 3], 0.3), ([2, 7, 8, 3], 0.6)]),
                EncodedText([2, 6, 6, 3], prompt=2, weight=0.5),
            ),
            sample(
                "b",
                EncodedText(
                    [2, 9, 8, 3], masked_ids=[2, 4, 8, 3], masked_at=[1], answers=[([2, 9, 3], 1.0)], source={"id": 5}
                ),
            ),
        ],
        pad_id=1,
        filled={"missing": 1},
    )
    assert batch.images[:, 0, 0, 0].tolist() == [ord("a"), ord("b")]
    assert batch.image_ids.tolist() == [hash("a"), hash("b")]
    assert batch.texts.ids.tolist() == [[2, 5, 3, 1, 1, 1, 1, 1], [2, 6, 6, 3, 1, 1, 1, 1], [2, 9, 8, 3, 1, 1, 1, 1]]
    assert batch.texts.mask.sum(1).tolist() == [3, 4, 4]
    assert batch.texts.image.tolist() == [0, 0, 1]
    assert batch.texts.prompt.tolist() == [1, 2, 1]
    assert batch.texts.weight.tolist() == [1.0, 0.5, 1.0]
    assert batch.answers is not None
    assert batch.masked is not None
    assert batch.answers.text.tolist() == [0, 0, 2]
    assert batch.answers.mask.sum(1).tolist() == [3, 4, 3]
    torch.testing.assert_close(batch.answers.weight, torch.tensor([0.3, 0.6, 1.0]))
    assert batch.masked.positions.tolist() == [2 * 8 + 1]
    assert batch.masked.labels.tolist() == [9]
    assert torch.equal(
        batch.masked.ids != batch.texts.ids,
        torch.zeros(3, 8).index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(1.0)).bool(),
    )
    assert batch.sources == [{}, {}, {"id": 5}]
    assert batch.filled == {"missing": 1}


@pytest.mark.parametrize(("longest", "want"), [(3, 8), (8, 8), (9, 16)])
def test_length_is_rounded_up_to_a_multiple_of_8(longest: int, want: int) -> None:
    texts = [EncodedText([2, 3]), EncodedText([5] * longest)]
    batch = collate([EncodedSample("a", 1, torch.zeros(3, 1, 1, dtype=torch.uint8), texts)], pad_id=0)
    assert batch.texts.ids.shape == (2, want)
    assert batch.answers is None
    assert batch.masked is None


def test_a_shard_for_many_workers_and_uneven_shards_give_equal_steps(
    write_set: WriteSet, make_loader: MakeLoader
) -> None:
    sets = write_set("one", samples=13, samples_per_shard=20), write_set("uneven", samples=9, samples_per_shard=8)
    assert [len(s.shards) for s in sets] == [1, 2]
    want = epoch(make_loader(*sets))
    loaders = [make_loader(*sets, world=2, rank=rank, workers=3) for rank in range(2)]
    parts = [epoch(loader) for loader in loaders]
    assert [len(part) for part in parts] == [22 // 4] * 2
    assert joined(parts) == want


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 3), (4, 0)])
def test_stopped_at_a_step_other_ranks_and_workers_go_on_bit_for_bit(
    write_set: WriteSet, make_loader: MakeLoader, world: int, workers: int
) -> None:
    """With a mixture, in the second epoch: one set is halfway through a pass, the other is read twice."""
    sets = write_set("a", samples=23, samples_per_shard=5), write_set("b", samples=11, samples_per_shard=20)
    mixed: Any = {"batch_size": 8, "streams": 8, "mixture": (0.5, 2.0)}
    whole = epoch(make_loader(*sets, **mixed, workers=1), 1)
    assert len(whole) == (12 + 22) // 8
    for start in (1, 3):
        loaders = [make_loader(*sets, **mixed, world=world, rank=r, workers=workers) for r in range(world)]
        assert joined([epoch(loader, 1, start) for loader in loaders]) == whole[start:]
    # what is drawn for a record in its second pass of an epoch is not what was drawn in its first
    twice = [row for batch in whole for row in batch if row[1] in {i for s in [sets[1]] for i in image_ids([s])}]
    images: dict[int, list[Any]] = {}
    for row in twice:
        images.setdefault(row[1], []).append(row[2])
    assert any(len(found) == 2 for found in images.values())
    assert all(found[0] != found[1] for found in images.values() if len(found) == 2)


def test_resuming_reads_nothing_of_what_was_read_and_opens_no_other_shard(
    write_set: WriteSet, make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DESIGN allows to read a shuffle block again; as records are found by their offsets, none is."""
    loader = make_loader(write_set(samples=60, samples_per_shard=5), streams=2, shuffle_block=4)
    reads: list[tuple[str, int]] = []
    original = ShardReader.read

    def read(self: ShardReader, path: str, source: str, number: int) -> Any:
        reads.append((str(path), number))
        return original(self, path, source, number)

    monkeypatch.setattr(ShardReader, "read", read)
    epoch(loader)
    whole, reads[:] = list(reads), []
    assert len(set(whole)) == 60
    epoch(loader, 0, 10)
    assert reads == whole[40:]
    assert len({path for path, _ in reads}) < len({path for path, _ in whole})


def test_what_lies_behind_the_last_wanted_step_is_neither_read_nor_counted(
    write_set: WriteSet, make_loader: MakeLoader
) -> None:
    loader = make_loader(write_set(samples=12, broken=(9,)), batch_size=4, training=False, max_bad_fraction=1.0)
    assert len(list(loader.iterate(0, stop_step=2))) == 2
    assert loader.bad == {}
    assert len(list(loader.iterate(0))) == 3
    assert loader.bad.total() == 1
