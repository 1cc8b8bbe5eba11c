"""Whether everything in a folder of shards can be used: `vlm shards check`. Reads and decodes all of it."""

from dataclasses import dataclass, field

from vlm.data.images import decode_image
from vlm.data.index import ShardSet
from vlm.data.records import BadRecord, scan_shard
from vlm.data.remote import RemoteShard
from vlm.data.walk import UNDECODABLE, progress, walk
from vlm.errors import BadImage, UserError

EXAMPLES = 3


@dataclass
class Faults:
    """Counts by cause, with the first few cases in words; records: how many were looked at."""

    records: int
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, cause: str, message: str) -> None:
        self.counts[cause] = self.counts.get(cause, 0) + 1
        if len(examples := self.examples.setdefault(cause, [])) < EXAMPLES:
            examples.append(message)

    def __str__(self) -> str:
        if not self.counts:
            return f"{self.records:,} records, all of them usable"
        lines = [f"{self.records:,} records; faults: {sum(self.counts.values()):,}"]
        for cause, count in sorted(self.counts.items()):
            lines.append(f"{count:>9,}  {cause}")
            lines += [f"           {example}" for example in self.examples[cause]]
            if count > len(self.examples[cause]):
                lines.append("           ...")
        return "\n".join(lines)


def check(shards: ShardSet) -> Faults:
    """Faults of the shards (damaged, or not what the index says; local ones only) and of their records, under the causes that training counts.

    Raises:
        UserError: there is nothing to check.
    """
    faults = Faults(shards.samples)
    _check_files(shards, faults)
    if not shards.samples and not faults.counts:
        raise UserError(f"{shards.root} holds no records, so there is nothing to check; make or copy its shards anew.")
    for place, record in progress(walk(shards), shards, "decoding"):
        if isinstance(record, BadRecord):
            faults.add(record.cause, f"{place}: {record}")
            continue
        try:
            decode_image(record.image, name=f"{record.source}/{record.key}")
        except BadImage as error:
            faults.add(UNDECODABLE, f"{place}: {error}")
    return faults


def _check_files(shards: ShardSet, faults: Faults) -> None:
    for shard in shards.shards:
        location = shards.locate(shard)
        if isinstance(location, RemoteShard):
            continue
        try:
            offsets, damage = scan_shard(location)
        except OSError:
            continue  # its records are all counted
        if damage:
            faults.add("damaged shard", f"{shard.name}: {damage}; its {len(offsets) - 1:,} whole records are read.")
        elif len(offsets) - 1 != shard.samples:
            faults.add(
                "not as the index says",
                f"{shard.name} holds {len(offsets) - 1:,} records, the index says {shard.samples:,}; run `vlm shards index {shards.root}`.",
            )
