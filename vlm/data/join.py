"""Several shard folders with the same photographs made into one: each photograph once, with all its captions and questions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.index import ShardSet
from vlm.data.records import extension_of
from vlm.data.scan import scan
from vlm.data.shards import ShardWriter
from vlm.errors import ConfigError


@dataclass(frozen=True)
class Joined:
    """What came of it. records: read; images: written; shared: images that more than one record had."""

    records: int
    images: int
    shared: int


def join(sets: Sequence[ShardSet], out: Path) -> Joined:
    """Writes every image of `sets` once, in the order of first appearance, with the captions and questions of all its records.

    Records belong together when source and image id are equal, as everywhere; the image and the key are the first record's. A training step then
    encodes the image once for all its texts, and no image meets itself in a batch. Texts are kept in memory, images are read when they are written.

    Raises:
        ConfigError: sets of different sources, which can share no image. UserError: a shard cannot be read, or `out` cannot be written.
    """
    sources = sorted({shards.source for shards in sets})
    if len(sources) != 1:
        raise ConfigError(
            f"the folders come from different sources ({', '.join(sources)}), so no image is in two of them; list them all in data.splits.train."
        )
    texts: dict[int, tuple[list[str], list[dict[str, Any]]]] = {}
    given: dict[int, set[str]] = {}  # captions that no model made, in one record at least
    counts: Counter[int] = Counter()
    for record in scan(sets):
        captions, questions = texts.setdefault(record.image_id, ([], []))
        captions += [text for text in record.captions if text not in captions]
        given.setdefault(record.image_id, set()).update(set(record.captions) - set(record.synthetic))
        questions += [question for question in record.questions if question not in questions]
        counts[record.image_id] += 1
    with ShardWriter(out, sources[0]) as writer:
        for record in scan(sets):
            if record.image_id not in texts:
                continue
            key = writer.free_key(record.key)
            captions, questions = texts.pop(record.image_id)
            synthetic = [text for text in captions if text not in given[record.image_id]]
            writer.write(key, record.image, extension_of(record.image), captions, questions, record.name, synthetic)
    return Joined(counts.total(), len(counts), sum(count > 1 for count in counts.values()))
