"""Every record of some shards, one after another, without decoding images: for vocabularies, answer lists and the check of honest splits."""

from collections.abc import Iterable, Iterator

from vlm.data.index import ShardSet
from vlm.data.records import UNREADABLE, BadRecord, Record, ShardReader
from vlm.errors import ConfigError, UserError


def scan(sets: Iterable[ShardSet]) -> Iterator[Record]:
    """The usable records in the order of the shards; those that training would count as bad are passed over.

    Raises:
        ConfigError: nobody counted the records of a set.
        UserError: a whole shard cannot be read. What would be learned of the rest could differ from rank to rank.
    """
    reader = ShardReader()
    try:
        for shards in sets:
            if not shards.counted:
                raise ConfigError(
                    f"{shards.root} has no index, so its records cannot all be read: give tokenizer.source or init_from, set vqa.inference=generate, "
                    "or make an index (`vlm shards index`) and use data.order=exact."
                )
            for shard in shards.shards:
                for number in range(shard.samples):
                    try:
                        yield reader.read(shards.locate(shard), shards.source, number)
                    except BadRecord as error:
                        if error.cause == UNREADABLE:
                            raise UserError(str(error)) from None
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
