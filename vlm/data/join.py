"""Several shard folders with the same photographs made into one: each photograph once, with all its captions and questions."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.index import ShardSet
from vlm.data.places import check_sources
from vlm.data.records import BadRecord, Record, extension_of
from vlm.data.shards import ShardWriter
from vlm.data.walk import check_apart, progress, walk
from vlm.errors import ConfigError


@dataclass(frozen=True)
class Joined:
    """What came of it. records: read; images: written; shared: images that more than one record had; differing: those of them whose records did not
    all have the same bytes."""

    records: int
    images: int
    shared: int
    differing: int

    def __str__(self) -> str:
        first = (
            f"; {self.differing:,} of these had other bytes elsewhere, and the first are kept" if self.differing else ""
        )
        return f"{self.images:,} images of {self.records:,} records, {self.shared:,} of them in several{first}"


def join(sets: Sequence[ShardSet], out: Path) -> Joined:
    """Writes every image of `sets` once, in the order of first appearance, with the captions and questions of all its records.

    Records belong together when source and image id are equal, as everywhere; the image and the key are the first record's. A training step then
    encodes the image once for all its texts, and no image meets itself in a batch. Texts are kept in memory, images are read when they are written.
    An image's records may differ in its bytes: copies of a photograph that were encoded again, so these are counted, not refused.

    Raises:
        ConfigError: sets of different sources, which can share no image, or whose source is a guess alone; or `out` is one of the folders.
        UserError: a shard cannot be read, or `out` cannot be written.
    """
    check_sources(sets)
    check_apart(sets, out)
    sources = sorted({shards.source for shards in sets})
    if len(sources) != 1:
        raise ConfigError(
            f"the folders come from different sources ({', '.join(sources)}), so no image is in two of them; list them all in data.splits.train."
        )
    texts: dict[int, tuple[list[str], list[dict[str, Any]]]] = {}
    given: dict[int, set[str]] = {}  # captions that no model made, in one record at least
    counts: Counter[int] = Counter()
    images: dict[int, bytes] = {}
    differing: set[int] = set()
    writer = ShardWriter(out, sources[0])
    writer.check()
    for record in _records(sets, "reading"):
        captions, questions = texts.setdefault(record.image_id, ([], []))
        captions += [text for text in record.captions if text not in captions]
        given.setdefault(record.image_id, set()).update(set(record.captions) - set(record.synthetic))
        questions += [question for question in record.questions if question not in questions]
        counts[record.image_id] += 1
        digest = hashlib.blake2b(record.image, digest_size=8).digest()
        if images.setdefault(record.image_id, digest) != digest:
            differing.add(record.image_id)
    with writer:
        for record in _records(sets, "writing"):
            if record.image_id not in texts:
                continue
            key = writer.free_key(record.key)
            captions, questions = texts.pop(record.image_id)
            synthetic = [text for text in captions if text not in given[record.image_id]]
            writer.write(key, record.image, extension_of(record.image), captions, questions, record.name, synthetic)
    return Joined(counts.total(), len(counts), sum(count > 1 for count in counts.values()), len(differing))


def _records(sets: Sequence[ShardSet], what: str) -> Iterator[Record]:
    """The usable ones, folder by folder."""
    for shards in sets:
        for _, record in progress(walk(shards, strict=True), shards, what):
            if not isinstance(record, BadRecord):
                yield record
