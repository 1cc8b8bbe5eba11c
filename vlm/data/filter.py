"""Shards without what does not belong in a training set: `vlm shards filter`. What falls is counted by cause and shown on a page (dropped.py)."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm.data.dropped import Dropped, Report, write_dropped
from vlm.data.images import decode_image, read_header
from vlm.data.index import ShardSet
from vlm.data.info import words
from vlm.data.perceptual_hash import NearDuplicates, perceptual_hash
from vlm.data.records import BadRecord, Record
from vlm.data.text import clean_caption
from vlm.data.walk import UNDECODABLE, copy, progress, rewriting, walk
from vlm.errors import BadImage, ConfigError, UserError
from vlm.files import write_json

HASHED_SIDE = 64  # a JPEG is decoded no larger than its hash needs
Scores = list[float] | None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is dropped; by default nothing.

    Of a record those captions go that have fewer words than `min_words` or more than `max_words`, that are among `stop` (cleaned captions), or that
    score below `min_score` with their image; and the record with them where no caption and no question stays. Records go whose image has a shorter
    side under `min_side` pixels, sides whose ratio is above `max_aspect`, or a perceptual hash within `near_duplicates` bits of one that was kept.
    """

    min_words: int | None = None
    max_words: int | None = None
    stop: frozenset[str] = frozenset()
    min_score: float | None = None
    min_side: int | None = None
    max_aspect: float | None = None
    near_duplicates: int | None = None

    def __post_init__(self) -> None:
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise ConfigError(
                f"min-words={self.min_words} is more than max-words={self.max_words}: no caption would stay."
            )
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise ConfigError(f"max-aspect={self.max_aspect:g}: the longer side over the shorter is at least 1.")
        if self.near_duplicates is not None and not 0 <= self.near_duplicates <= 16:
            raise ConfigError(
                f"near-duplicates={self.near_duplicates}: give 0 to 16 bits of 64; different photographs differ in 10 and more."
            )

    def caption(self, text: str, score: float | None) -> str | None:
        """Why a caption is dropped, or None."""
        count = words(text)
        if self.min_words is not None and count < self.min_words:
            return "caption too short"
        if self.max_words is not None and count > self.max_words:
            return "caption too long"
        if self.stop and clean_caption(text, count) in self.stop:
            return "caption in the stop list"
        # not "score < min_score": a score that is no number is no reason to keep the caption
        if self.min_score is not None and score is not None and not score >= self.min_score:
            return "score too low"
        return None

    def size(self, image: bytes) -> tuple[str, str] | None:
        """Why a record is dropped for its image's size, and that size, or None. Raises BadImage."""
        if self.min_side is None and self.max_aspect is None:
            return None
        _, width, height = read_header(image)
        if self.min_side is not None and min(width, height) < self.min_side:
            return "image too small", f"{width}x{height} pixels"
        if self.max_aspect is not None and max(width, height) > self.max_aspect * min(width, height):
            return "odd aspect ratio", f"{width}x{height} pixels"
        return None

    def told(self) -> dict[str, Any]:
        """Those in force, for the report."""
        values = {name: value for name, value in asdict(self).items() if value is not None and value != frozenset()}
        return values | ({"stop": sorted(self.stop)} if self.stop else {})


def read_stop_list(path: Path) -> frozenset[str]:
    """The captions of a text file, one a line, cleaned as captions are. Raises UserError where it is no UTF-8 text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as such.") from None
    return frozenset(clean_caption(line, len(line)) for line in lines if line.strip())


def filter_shards(
    shards: ShardSet,
    out: Path,
    rules: Rules,
    scores: Iterable[Scores] | None = None,
    told: dict[str, Any] | None = None,
) -> Report:
    """Writes what `rules` leave of `shards` into the new folder `out`, in the same order, with report.json and dropped.html.

    Records that cannot be read are dropped; an image that cannot be decoded drops its record where a rule looks at images. scores: for each of the
    `shards.samples` places those of its captions, None where its image cannot be decoded; needed for `rules.min_score`. told: goes into the report.

    Raises:
        ConfigError: `out` is the folder that is read, or scores are lacking. UserError: nothing would be left, or `out` cannot be written.
    """
    if rules.min_score is not None and scores is None:
        raise ConfigError("min-score needs scores: give a model that compares images and texts with --model.")
    report = Report(shards.root, shards.source, rules.told() | (told or {}), shards.samples)
    work = _Filter(rules, report)
    scored: Iterator[Scores] | None = None if scores is None else iter(scores)
    with rewriting(shards, out) as writer:
        for number, (_, record) in enumerate(progress(walk(shards, strict=True), shards, "filtering")):
            score = None if scored is None else next(scored)
            if isinstance(record, BadRecord):
                report.drop_record(record.cause, Dropped(number, (), str(record)))
            elif (captions := work.keep(number, record, score)) is not None:
                copy(writer, record, captions)
        if not report.records_kept:
            raise UserError(f"nothing would be left of {shards.root}, so nothing was written: {report}")
    write_dropped(out / "dropped.html", shards, report)
    write_json(out / "report.json", report.as_json())
    return report


class _Filter:
    """Judges one record after another; remembers the images that were kept."""

    def __init__(self, rules: Rules, report: Report) -> None:
        self.rules, self.report = rules, report
        self._kept = None if rules.near_duplicates is None else NearDuplicates(rules.near_duplicates)

    def keep(self, number: int, record: Record, scores: Scores) -> list[str] | None:
        """The captions that the record keeps, or None where it is dropped. Only what is kept makes a later image a near-duplicate."""
        self.report.captions += len(record.captions)
        captions = record.captions
        cause, note, other = "", "", None
        try:
            if (size := self.rules.size(record.image)) is not None:
                cause, note = size
            elif self.rules.min_score is not None and scores is None:
                decode_image(record.image)  # says why there is no score
                raise BadImage("it has no score")
            else:
                captions = self._captions(number, record, scores)
                if not captions and not record.questions:
                    cause, note = "no text left", " | ".join(record.captions)
                elif (other := self._near(number, record)) is not None:
                    cause = "near-duplicate"
        except BadImage as error:
            cause, note = UNDECODABLE, str(error)
        if not cause:
            self.report.records_kept += 1
            self.report.captions_kept += len(captions)
            return captions
        self.report.drop_record(cause, Dropped(number, tuple(captions), note, other))
        return None

    def _captions(self, number: int, record: Record, scores: Scores) -> list[str]:
        """Those that stay."""
        kept = []
        given: list[float | None] = [None] * len(record.captions) if scores is None else [*scores]
        for text, score in zip(record.captions, given, strict=True):
            cause = self.rules.caption(text, score)
            if cause is None:
                kept.append(text)
            else:
                note = "" if score is None else f"score {score:.3f}"
                self.report.drop_caption(cause, Dropped(number, (text,), note))
        return kept

    def _near(self, number: int, record: Record) -> int | None:
        """The number of the earlier record that looks the same; where there is none, this one is remembered."""
        if self._kept is None:
            return None
        value = perceptual_hash(decode_image(record.image, at_least=HASHED_SIDE))
        other = self._kept.find(value)
        if other is None:
            self._kept.add(value, number)
        return other
