"""What lies in a folder of shards, told in numbers: `vlm shards info`. Nothing is decoded; of an image only the header is read."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from vlm.data.images import read_header
from vlm.data.index import ShardSet
from vlm.data.records import BadRecord, Record
from vlm.data.text import clean_caption
from vlm.data.walk import progress, walk
from vlm.errors import BadImage

COMMONEST = 10
LABELS = {
    "shorter_side": "shorter side, pixels",
    "longer_side": "longer side, pixels",
    "image_bytes": "bytes of an image",
    "captions": "captions of an image",
    "words": "words of a caption",
    "questions": "questions of an image",
    "answers": "answers of a question",
}


@dataclass(frozen=True)
class Spread:
    """How some whole numbers are spread; quantiles are among the numbers themselves."""

    count: int
    min: int
    p5: int
    median: int
    p95: int
    max: int
    mean: float


@dataclass
class Info:
    """bad: records that cannot be used, by cause. formats: Pillow's names. spreads: by the names of LABELS, without what is not there."""

    folder: str
    source: str
    shards: int
    records: int
    bytes: int
    bad: dict[str, int]
    formats: dict[str, int]
    captions: int
    questions: int
    spreads: dict[str, Spread]
    distinct_answers: int
    commonest_answers: list[tuple[str, int]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        size = f"{self.bytes / 1e6:,.1f} MB"
        lines = [
            f"{self.folder}: source {self.source}, {self.shards:,} shard{'s' * (self.shards != 1)}, {self.records:,} records, {size}"
        ]
        if self.bad:
            causes = ", ".join(f"{count:,} {cause}" for cause, count in sorted(self.bad.items()))
            lines.append(f"unusable records: {causes} (vlm shards check names them)")
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
        lines.append(f"{self.captions:,} captions, {self.questions:,} questions; images: {formats or 'none'}")
        columns = ("min", "p5", "median", "p95", "max")
        lines.append(" " * 24 + "".join(f"{name:>11}" for name in (*columns, "mean")))
        for name, spread in self.spreads.items():
            cells = "".join(f"{getattr(spread, column):>11,}" for column in columns)
            lines.append(f"{LABELS[name]:<24}{cells}{spread.mean:>11,.1f}")
        if self.commonest_answers:
            answers = ", ".join(f"{answer!r} {count:,}" for answer, count in self.commonest_answers)
            lines.append(f"commonest of {self.distinct_answers:,} answers: {answers}")
        return "\n".join(lines)


def info(shards: ShardSet) -> Info:
    """Reads all records once. Raises UserError where a shard cannot be opened."""
    counters: dict[str, Counter[int]] = {name: Counter() for name in LABELS}
    bad: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    for _, record in progress(walk(shards), shards, "reading"):
        if isinstance(record, BadRecord):
            bad[record.cause] += 1
        else:
            _count(record, counters, formats, answers)
    return Info(
        folder=shards.root,
        source=shards.source,
        shards=len(shards.shards),
        records=shards.samples,
        bytes=sum(shard.bytes for shard in shards.shards),
        bad=dict(bad),
        formats=dict(formats.most_common()),
        captions=counters["words"].total(),
        questions=counters["answers"].total(),
        spreads={name: spread(counter) for name, counter in counters.items() if any(counter)},
        distinct_answers=len(answers),
        commonest_answers=answers.most_common(COMMONEST),
    )


def _count(record: Record, counters: dict[str, Counter[int]], formats: Counter[str], answers: Counter[str]) -> None:
    try:
        name, width, height = read_header(record.image)
    except BadImage:
        name = "unreadable"
    else:
        counters["shorter_side"][min(width, height)] += 1
        counters["longer_side"][max(width, height)] += 1
    formats[name] += 1
    counters["image_bytes"][len(record.image)] += 1
    counters["captions"][len(record.captions)] += 1
    counters["questions"][len(record.questions)] += 1
    counters["words"].update(words(caption) for caption in record.captions)
    for question in record.questions:
        given = question.get("answers") or []
        counters["answers"][len(given)] += 1
        answers.update(str(answer) for answer in given)


def words(caption: str) -> int:
    """How many words a caption has once it is cleaned as for training."""
    return len(clean_caption(caption, len(caption)).split())


def spread(counts: Counter[int]) -> Spread:
    """Of the numbers that `counts` counts: at least one."""
    values, total = sorted(counts), counts.total()

    def quantile(share: float) -> int:
        below = 0
        for value in values:
            below += counts[value]
            if below > share * (total - 1):
                return value
        return values[-1]

    mean = sum(value * count for value, count in counts.items()) / total
    return Spread(total, values[0], quantile(0.05), quantile(0.5), quantile(0.95), values[-1], mean)
