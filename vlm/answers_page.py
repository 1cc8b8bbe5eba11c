"""Right and wrong answers with their pictures: one HTML file, with everything in it, that needs no program to sort or filter."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from vlm.data.index import ShardSet
from vlm.data.page import NO_PICTURE, picture, short, write_page
from vlm.data.scan import scan
from vlm.metrics.vqa import accuracy
from vlm.tasks.task import Record
from vlm.tasks.vqa_task import by_type, type_of

THUMBNAIL = 200
SHOWN = {"wrong": 240, "partly": 60, "right": 100}
"""Most answers on the page by how right they are: no annotator agrees, some do, all that are needed do."""
LARGEST = 8 * 2**20
"""Most bytes of pictures."""
TYPES = 40
"""Most question types that can be chosen."""


@dataclass(frozen=True)
class Example:
    """An answer on the page; kind: wrong, partly or right."""

    source: str
    record: Record
    accuracy: float

    @property
    def kind(self) -> str:
        """How right it is."""
        return "wrong" if self.accuracy == 0 else "right" if self.accuracy > 0.95 else "partly"


def choose(records: Mapping[str, Sequence[Record]]) -> list[Example]:
    """What the page shows, confident wrong answers first, then the partly right, then the right, least confident first.

    Of each kind equally many of every question type, as far as they go: the most confident wrong ones, the least confident others.
    """
    groups: dict[str, dict[str, list[Example]]] = {kind: defaultdict(list) for kind in SHOWN}
    for source, answered in records.items():
        for record in answered:
            if record["references"]:
                example = Example(source, record, accuracy(record["answer"], record["references"]))
                groups[example.kind][type_of(record, "question_type") or ""].append(example)
    chosen: list[Example] = []
    for kind, most in SHOWN.items():
        for group in groups[kind].values():
            group.sort(key=lambda e: _rank(e, kind))
        turns = max(map(len, groups[kind].values()), default=0)
        drawn = [group[turn] for turn in range(turns) for group in groups[kind].values() if turn < len(group)]
        chosen += sorted(drawn[:most], key=lambda e: _rank(e, kind))
    return chosen


def _rank(example: Example, kind: str) -> tuple[float, str]:
    confidence = example.record["confidence"]
    return (-confidence if kind == "wrong" else confidence), str(example.record["question_id"])


def write_answers_page(
    path: Path, sets: Mapping[str, ShardSet], records: Mapping[str, Sequence[Record]], results: Mapping[str, Any]
) -> None:
    """One HTML file. sets, records: by name of the set. results: what results.json says: scores and intervals by set.

    Raises:
        UserError: it cannot be written.
    """
    examples = choose(records)
    pictures = _pictures(sets, examples)
    kinds = _types(examples)
    everything = [record for answered in records.values() for record in answered]
    sections = [
        f"<h1>Answers on {escape(', '.join(records))}</h1>",
        *(_scores(name, results["scores"][name], results["intervals"].get(name, {})) for name in records),
        f"<details><summary>by question type</summary>{_table(by_type(everything, 'question_type'))}</details>",
        f"<p>{len(examples)} of {len(everything)} questions: confident wrong answers first, then partly right ones, then right ones.</p>",
        *_filters(kinds, examples),
        f"<main>{''.join(_figure(e, p, kinds) for e, p in zip(examples, pictures, strict=True))}</main>",
    ]
    rules = [f"#t{i}:checked~main figure:not(.t{i}){{display:none}}" for i in range(1, len(kinds) + 1)]
    rules += [f"#k-{kind}:checked~main figure:not(.{kind}){{display:none}}" for kind in SHOWN]
    write_page(path, "Answers", _STYLE + "".join(rules), "\n".join(sections))


def _types(examples: Sequence[Example]) -> dict[str, int]:
    """Answer types and the commonest question types of the examples, numbered from 1."""
    answers = sorted({kind for e in examples if (kind := type_of(e.record, "answer_type"))})
    counts: dict[str, int] = defaultdict(int)
    for example in examples:
        counts[_beginning(example)] += 1
    commonest = sorted(counts, key=lambda kind: (-counts[kind], kind))[:TYPES]
    return {kind: i for i, kind in enumerate([*answers, *sorted(commonest)], 1)}


def _beginning(example: Example) -> str:
    """The question type, as it is named on the page."""
    return f"{type_of(example.record, 'question_type')} …"


def _filters(kinds: Mapping[str, int], examples: Sequence[Example]) -> Iterator[str]:
    """Buttons that the style sheet reads: which types, and how right."""
    yield "<input type=radio name=type id=t0 checked><label for=t0>all types</label>"
    for kind, i in kinds.items():
        yield f"<input type=radio name=type id=t{i}><label for=t{i}>{short(kind)}</label>"
    yield "<br><input type=radio name=kind id=k-all checked><label for=k-all>all</label>"
    for kind in SHOWN:
        count = sum(example.kind == kind for example in examples)
        yield f"<input type=radio name=kind id=k-{kind}><label for=k-{kind}>{kind} ({count})</label>"


def _scores(name: str, scores: Mapping[str, Any], intervals: Mapping[str, Sequence[float]]) -> str:
    rows = []
    for key, value in scores.items():
        if isinstance(value, int | float):
            between = f"{intervals[key][0]:.2f} to {intervals[key][1]:.2f}" if key in intervals else ""
            rows.append(f"<tr><td>{escape(key)}<td>{value:.2f}<td>{between}")
    return f"<h2>{escape(name)}</h2><table><tr><th>score<th>value<th>95 % interval{''.join(rows)}</table>"


def _table(found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{short(name)}<td>{row['accuracy']:.2f}<td>{row['interval'][0]:.2f} to {row['interval'][1]:.2f}<td>{row['questions']}"
        for name, row in sorted(found.items(), key=lambda item: (-item[1]["questions"], item[0]))
    )
    return f"<table><tr><th>type<th>accuracy<th>95 % interval<th>questions{rows}</table>"


def _figure(example: Example, shown: str, kinds: Mapping[str, int]) -> str:
    record = example.record
    own = [kinds[kind] for kind in (type_of(record, "answer_type") or "", _beginning(example)) if kind in kinds]
    names = " ".join([example.kind, *(f"t{i}" for i in own)])
    given: dict[str, int] = defaultdict(int)
    for answer in record["references"]:
        given[answer] += 1
    people = ", ".join(f"{a} x {n}" if n > 1 else a for a, n in sorted(given.items(), key=lambda item: -item[1]))
    return (
        f'<figure class="{names}">{shown}<p>{short(record["question"])}</p><b>{short(record["answer"])}</b> '
        f"{100 * record['confidence']:.0f} %<small>{short(people)}</small>"
        f"<small>{short(str(record['question_id']))}: {100 * example.accuracy:.0f}</small></figure>\n"
    )


def _pictures(sets: Mapping[str, ShardSet], examples: Sequence[Example]) -> list[str]:
    """The tag of each example's picture; words where there is none, and once they are too many bytes."""
    wanted = {(e.source, e.record["key"]) for e in examples}
    found: dict[tuple[str, str], str] = {}
    for name, shards in sets.items():
        left = {key for source, key in wanted if source == name}
        for record in scan([shards]) if left else ():
            if record.key in left:
                found[name, record.key] = picture(record.image, THUMBNAIL)
                left.remove(record.key)
                if not left:
                    break
    room, shown = LARGEST, []
    for example in examples:
        tag = found.get((example.source, example.record["key"]), NO_PICTURE)
        room -= len(tag)
        shown.append(tag if room >= 0 else NO_PICTURE)
    return shown


_STYLE = (
    "main{display:flex;flex-wrap:wrap;gap:1em;margin-top:1em}figure{border-left-width:6px;width:13.4em}"
    ".wrong{border-left-color:#c33}.partly{border-left-color:#c93}.right{border-left-color:#393}p{margin:.4em 0}"
    "small{display:block}td,th{text-align:left;padding:0 1em 0 0}label{margin-right:.8em}summary{cursor:pointer}"
)
