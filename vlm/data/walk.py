"""Every record of some shards with its place, bad ones as the error that says why; and a new folder made of another's records."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from vlm.data.index import ShardInfo, ShardSet
from vlm.data.records import UNREADABLE, BadRecord, Record, ShardReader, extension_of
from vlm.data.shards import ShardWriter
from vlm.errors import ConfigError, UserError

UNDECODABLE = "undecodable image"  # as training counts it


class Place(NamedTuple):
    """A record's shard and its number in it."""

    shard: ShardInfo
    number: int

    def __str__(self) -> str:
        return f"record {self.number} of {self.shard.name}"


class Found(NamedTuple):
    """What lies at a place: a record, or why there is none."""

    place: Place
    record: Record | BadRecord


def walk(shards: ShardSet, first: int = 0, strict: bool = False, bare: bool = False) -> Iterator[Found]:
    """All `shards.samples` of them in the order of the shards, from number `first` on. bare: an image without a text is a record too.

    strict: a shard that cannot be read at all raises UserError, so that what is written from the records never lacks a shard because of an outage.
    """
    reader = ShardReader(bare)
    try:
        for shard in shards.shards:
            for number in range(min(first, shard.samples), shard.samples):
                found = Found(Place(shard, number), read_at(reader, shards, Place(shard, number)))
                if strict and isinstance(found.record, BadRecord) and found.record.cause == UNREADABLE:
                    raise UserError(str(found.record))
                yield found
            first = max(0, first - shard.samples)
    finally:
        reader.close()


def place_of(shards: ShardSet, number: int) -> Place:
    """Where the record lies that `walk` comes to as the one of this number. Raises IndexError beyond the last."""
    for shard in shards.shards:
        if number < shard.samples:
            return Place(shard, number)
        number -= shard.samples
    raise IndexError(number)


def read_at(reader: ShardReader, shards: ShardSet, place: Place) -> Record | BadRecord:
    """The record at a place, or why there is none."""
    try:
        return reader.read(shards.locate(place.shard), shards.source, place.number)
    except BadRecord as error:
        return error


def progress(found: Iterable[Found], shards: ShardSet, what: str) -> Iterator[Found]:
    """The same, with a line on stderr of how far it is and how long it will take."""
    return iter(tqdm(found, desc=what, total=shards.samples, unit=" images", mininterval=0.5))


def rewriting(shards: ShardSet, out: Path) -> ShardWriter:
    """A writer of a new folder for records of `shards`, with as many in a tar.

    Raises:
        ConfigError: `out` is the folder that is read. UserError: `out` holds tar files of others.
    """
    check_apart([shards], out)
    if not shards.samples:
        raise UserError(f"{shards.root} holds no records.")
    writer = ShardWriter(out, shards.source, max(shard.samples for shard in shards.shards))
    writer.check()
    return writer


def check_apart(sets: Sequence[ShardSet], out: Path) -> None:
    """Raises ConfigError where `out` is a folder that is read."""
    if out.resolve() in [Path(shards.root).resolve() for shards in sets]:
        raise ConfigError(f"{out} is the folder that is read, and shards are never changed in place; give another one.")


def copy(writer: ShardWriter, record: Record, captions: Sequence[str], made: Sequence[str] = ()) -> None:
    """Writes a record with these captions; image, questions and identity stay as they are, so that a model trained on it is still refused an
    evaluation on it. made: those of the captions that a model made, beside the ones that are marked so already."""
    key, extension = writer.free_key(record.key), extension_of(record.image)
    synthetic = [text for text in captions if text in record.synthetic or text in made]
    writer.write(key, record.image, extension, captions, record.questions, record.name, synthetic)
