"""What a filter dropped: counts by cause with examples, and a page that shows them."""

import random
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from vlm.data.index import ShardSet
from vlm.data.page import picture, short, write_page
from vlm.data.records import BadRecord, ShardReader
from vlm.data.walk import place_of, read_at

EXAMPLES = 40  # of a cause
THUMBNAIL = 160
WITH_ITS_RECORD = "with its record"


@dataclass(frozen=True)
class Dropped:
    """An example: the record's number in the shards that were read, the captions that went, a note, and the number of the record that it repeats."""

    number: int
    captions: tuple[str, ...]
    note: str = ""
    repeats: int | None = None


@dataclass
class Report:
    """What a filter did: numbers of what was read and kept, of what was dropped by cause, the settings, and examples drawn evenly of each cause."""

    folder: str
    source: str
    settings: dict[str, Any]
    records: int
    captions: int = 0
    records_kept: int = 0
    captions_kept: int = 0
    records_dropped: dict[str, int] = field(default_factory=dict)
    captions_dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[Dropped]] = field(default_factory=dict)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def drop_record(self, cause: str, example: Dropped) -> None:
        """Counts a record, and the captions that it still had."""
        if example.captions:
            going = self.captions_dropped.get(WITH_ITS_RECORD, 0) + len(example.captions)
            self.captions_dropped[WITH_ITS_RECORD] = going
        self._count(self.records_dropped, cause, example)

    def drop_caption(self, cause: str, example: Dropped) -> None:
        """Counts one caption of a record that may stay."""
        self._count(self.captions_dropped, cause, example)

    def _count(self, counts: dict[str, int], cause: str, example: Dropped) -> None:
        counts[cause] = seen = counts.get(cause, 0) + 1
        kept = self.examples.setdefault(cause, [])
        if len(kept) < EXAMPLES:
            kept.append(example)
        elif (slot := self._random.randrange(seen)) < EXAMPLES:  # every one has the same chance to be among those shown
            kept[slot] = example

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "source": self.source,
            "settings": self.settings,
            "records": {"read": self.records, "kept": self.records_kept, "dropped": self.records_dropped},
            "captions": {"read": self.captions, "kept": self.captions_kept, "dropped": self.captions_dropped},
        }

    def __str__(self) -> str:
        counts = f"{self.records_kept:,} of {self.records:,} records and {self.captions_kept:,} of {self.captions:,} captions kept"
        lines = [counts]
        for what, dropped in (("records", self.records_dropped), ("captions", self.captions_dropped)):
            if dropped:
                causes = ", ".join(f"{count:,} {cause}" for cause, count in sorted(dropped.items()))
                lines.append(f"{what} dropped: {causes}")
        return "\n  ".join(lines)


def write_dropped(path: Path, shards: ShardSet, report: Report) -> None:
    """One HTML file with everything in it: the counts, and the examples of each cause as small pictures with their captions."""
    reader = ShardReader()
    try:
        sections = [_section(cause, report, shards, reader) for cause in sorted(report.examples)]
    finally:
        reader.close()
    settings = ", ".join(f"{name.replace('_', '-')} {_told(value)}" for name, value in report.settings.items())
    head = f"{report.records_kept:,} of {report.records:,} records and {report.captions_kept:,} of {report.captions:,} captions kept"
    title = f"<h1>Dropped from {escape(report.folder)}</h1>\n<p>{head}. Settings: {escape(settings) or 'none'}.</p>\n"
    write_page(path, f"Dropped from {report.source}", _STYLE, title + "\n".join(sections))


def _section(cause: str, report: Report, shards: ShardSet, reader: ShardReader) -> str:
    records, captions = report.records_dropped.get(cause, 0), report.captions_dropped.get(cause, 0)
    count = f"records: {records:,}" if records else f"captions: {captions:,}"
    examples = report.examples[cause]
    shown = f", {len(examples)} of them drawn" if len(examples) < records + captions else ""
    figures = "\n".join(_figure(example, shards, reader) for example in sorted(examples, key=lambda e: e.number))
    return f"<h2>{escape(cause)} ({count}{shown})</h2>\n<div>\n{figures}\n</div>"


def _figure(example: Dropped, shards: ShardSet, reader: ShardReader) -> str:
    place = place_of(shards, example.number)
    record = read_at(reader, shards, place)
    lines = [f"<p>{short(text)}</p>" for text in example.captions]
    if example.note:
        lines.append(f"<small>{short(example.note)}</small>")
    if isinstance(record, BadRecord):
        return f"<figure>{''.join(lines)}<small>{escape(str(place))}</small></figure>"
    pictures = picture(record.image, THUMBNAIL)
    if example.repeats is not None:
        other = read_at(reader, shards, place_of(shards, example.repeats))
        if not isinstance(other, BadRecord):
            pictures += picture(other.image, THUMBNAIL)
            lines.append(f"<small>repeats {short(other.key)} (right)</small>")
    name = f"<small title='{escape(str(place))}'>{short(record.key)}</small>"
    return f"<figure>{pictures}{''.join(lines)}{name}</figure>"


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}: {_told(one)}" for name, one in value.items())
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_STYLE = (
    "body{max-width:90em}h2{margin-top:2em}div{display:flex;flex-wrap:wrap;gap:1em}figure{max-width:22em}p{margin:.3em 0}"
    "img{margin-right:.4em;vertical-align:top}small{display:block}"
)
