"""What a filter dropped: counts by cause with examples, and a page that shows them."""

import base64
import io
import os
import random
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from vlm.data.images import decode_image
from vlm.data.index import ShardSet
from vlm.data.records import BadRecord, ShardReader
from vlm.data.walk import place_of, read_at
from vlm.errors import BadImage

EXAMPLES = 40  # of a cause
THUMBNAIL = 160
LONGEST = 300  # letters of a caption or note on the page
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


def write_page(path: Path, shards: ShardSet, report: Report) -> None:
    """One HTML file with everything in it: the counts, and the examples of each cause as small pictures with their captions."""
    reader = ShardReader()
    try:
        sections = [_section(cause, report, shards, reader) for cause in sorted(report.examples)]
    finally:
        reader.close()
    settings = ", ".join(f"{name.replace('_', '-')} {_told(value)}" for name, value in report.settings.items())
    head = f"{report.records_kept:,} of {report.records:,} records and {report.captions_kept:,} of {report.captions:,} captions kept"
    text = (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>Dropped from {escape(report.source)}</title>\n<style>{_STYLE}</style>\n"
        f"<h1>Dropped from {escape(report.folder)}</h1>\n<p>{head}. Settings: {escape(settings) or 'none'}.</p>\n"
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # a file name that is not UTF-8 has half characters in it, which no page can hold
        temporary.write_bytes((text + "\n".join(sections) + "</html>\n").encode("utf-8", "replace"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    lines = [f"<p>{escape(_short(text))}</p>" for text in example.captions]
    if example.note:
        lines.append(f"<small>{escape(_short(example.note))}</small>")
    if isinstance(record, BadRecord):
        return f"<figure>{''.join(lines)}<small>{escape(str(place))}</small></figure>"
    pictures = _thumbnail(record.image)
    if example.repeats is not None:
        other = read_at(reader, shards, place_of(shards, example.repeats))
        if not isinstance(other, BadRecord):
            pictures += _thumbnail(other.image)
            lines.append(f"<small>repeats {escape(_short(other.key))} (right)</small>")
    name = f"<small title='{escape(str(place))}'>{escape(_short(record.key))}</small>"
    return f"<figure>{pictures}{''.join(lines)}{name}</figure>"


def _thumbnail(data: bytes) -> str:
    try:
        image = decode_image(data, at_least=THUMBNAIL)
    except BadImage:
        return "<i>no picture</i>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}: {_told(one)}" for name, one in value.items())
    if isinstance(value, list):
        return _short("; ".join(map(str, value)))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2em;max-width:90em}h2{margin-top:2em}div{display:flex;flex-wrap:wrap;gap:1em}"
    "figure{margin:0;padding:.6em;border:1px solid #ccc;border-radius:4px;max-width:22em;overflow-wrap:anywhere}p{margin:.3em 0}"
    "img{margin-right:.4em;vertical-align:top}small{display:block;color:#666}"
)
