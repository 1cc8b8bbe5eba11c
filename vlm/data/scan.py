"""Every record of some shards, one after another, without decoding images: for vocabularies, answer lists and the check of honest splits."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from vlm.data.index import ShardSet
from vlm.data.records import BadRecord, Record, ShardReader


def scan(sets: Iterable[ShardSet]) -> Iterator[Record]:
    """The usable records in the order of the shards; those that training would count as bad are passed over."""
    reader = ShardReader()
    try:
        for shards in sets:
            for shard in shards.shards:
                for number in range(shard.samples):
                    try:
                        yield reader.read(Path(shards.root) / shard.name, shards.source, number)
                    except BadRecord:
                        continue
    finally:
        reader.close()


def image_ids(sets: Iterable[ShardSet]) -> set[int]:
    """The identities of all images."""
    return {record.image_id for record in scan(sets)}


def texts(sets: Iterable[ShardSet]) -> Iterator[str]:
    """All captions, questions and answers as they stand in the shards."""
    for record in scan(sets):
        yield from record.captions
        for question in record.questions:
            yield question["question"]
            yield from question.get("answers") or ()
