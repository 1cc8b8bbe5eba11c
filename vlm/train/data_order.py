"""What the order of a run's samples depends on, as its saved state names it: a run that goes on in another order would read some records twice and
others not at all, and nothing else would tell.

Where shards lie, the numbers of ranks and of workers, and `train.accumulate` change nothing about which samples a step is of.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vlm.config import DataConfig
from vlm.errors import ConfigError

TRAIN = "data.splits.train"
STREAMS = "data.streams"


class Shard(Protocol):
    """One tar."""

    @property
    def name(self) -> str:
        """Of the file."""
        ...

    @property
    def samples(self) -> int:
        """Records in it; of shards that nobody counted 0."""
        ...


class Shards(Protocol):
    """A set of shards of one source, wherever they lie."""

    @property
    def source(self) -> str:
        """Of their images, which their identities are made of."""
        ...

    @property
    def shards(self) -> Sequence[Shard]:
        """In the order of the set."""
        ...


def data_order(data: DataConfig, seed: int, streams: int, sets: Sequence[Shards]) -> dict[str, Any]:
    """By the names of the settings what the order of the samples is a function of, in plain values. streams: as `data.streams` came out."""
    return {
        "seed": seed,
        "data.order": data.order,
        STREAMS: streams,
        "data.shuffle_block": data.shuffle_block,
        "data.batch_size": data.batch_size,
        "data.epoch_samples": data.epoch_samples,
        "data.mixture": [float(weight) for weight in data.mixture] or [1.0] * len(sets),
        TRAIN: [_described(shards, counted=data.order == "exact") for shards in sets],
    }


def _described(shards: Shards, counted: bool) -> dict[str, Any]:
    """counted: whether the order depends on the numbers of records, which nobody may have counted otherwise."""
    listed = "".join(f"{shard.name} {shard.samples if counted else ''}\n" for shard in shards.shards)
    samples = sum(shard.samples for shard in shards.shards) if counted else None
    digest = hashlib.sha256(listed.encode()).hexdigest()[:16]
    return {"source": shards.source, "shards": len(shards.shards), "samples": samples, "digest": digest}


def check_order(began: Mapping[str, Any] | None, now: Mapping[str, Any] | None, out: str) -> None:
    """Refuses to go on in another order than the run in the folder `out` began with. None, or a part that is missing: it is not known, as of states
    that were written before there was one.

    Raises:
        ConfigError: names what differs, what it was and is, and how to mend it.
    """
    if began is None or now is None:
        return
    told = [_told(key, began[key], value) for key, value in now.items() if key in began and began[key] != value]
    if told:
        raise ConfigError(
            f"the saved run took its samples in another order, and would go on with wrong ones: {'; '.join(told)}. Set it back ({out}/config.yaml "
            f"has the settings), or start a new run from these weights: --init-from {out}/latest, without --resume and with another --out."
        )


def _told(key: str, was: Any, now: Any) -> str:
    if key != TRAIN:
        return f"{key} was {was} and is {now}"
    before, after = ([one["source"] for one in sets] for sets in (was, now))
    if before != after:
        return f"{key} was of {', '.join(before)} and is of {', '.join(after)}"
    place, old, new = next((i, a, b) for i, (a, b) in enumerate(zip(was, now, strict=True)) if a != b)
    sizes = _size(old), _size(new)
    same = ", but their names or sizes are not the same" if sizes[0] == sizes[1] else ""
    return f"{key}.{place} ({old['source']}) was {sizes[0]} and is {sizes[1]}{same}"


def _size(described: Mapping[str, Any]) -> str:
    records = "" if described["samples"] is None else f" of {described['samples']} records"
    return f"{described['shards']} shards{records}"
