"""Filtered shards: each rule drops what it names and nothing else, what stays is as it was, and the account is complete."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.cli import main
from vlm.data.filter import Rules, filter_shards, read_stop_list
from vlm.data.index import ShardSet, load_index
from vlm.data.records import Record
from vlm.data.scan import scan
from vlm.data.shards import ShardWriter
from vlm.data.text import clean_caption
from vlm.errors import ConfigError, UserError

EVIL = ["<script>alert(1)</script> a dog", '"><img src=x onerror=alert(2)>', "</figure></html>&lt;b&gt;", "'onload='x"]


def noise(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


Made = dict[str, tuple[bytes, list[str], list[str]]]  # key -> image, captions, questions
GOOD: Made = {
    f"good{i}": (encoded(noise(i), "PNG" if i % 2 else "JPEG"), [f"a good caption number {i}", f"another one {i}"], [])
    for i in range(5)
} | {"asked": (encoded(noise(9)), [], ["what is it?"])}


def write(folder: Path, records: Made, source: str = "web") -> ShardSet:
    with ShardWriter(folder, source, samples_per_shard=4) as writer:
        for number, (key, (image, captions, questions)) in enumerate(records.items()):
            asked = [{"question_id": i, "question": q, "answers": ["yes"]} for i, q in enumerate(questions)]
            writer.write(key, image, "png" if image[:1] == b"\x89" else "jpg", captions, asked, number)
    return load_index(folder)


def records(folder: Path) -> dict[str, Record]:
    return {record.key: record for record in scan([load_index(folder)])}


def test_nothing_asked_nothing_changed(tmp_path: Path) -> None:
    shards = write(tmp_path / "in", GOOD)
    report = filter_shards(shards, tmp_path / "out", Rules())
    assert (report.records_kept, report.captions_kept) == (report.records, report.captions) == (6, 10)
    assert report.records_dropped == report.captions_dropped == {}
    for tar in (tmp_path / "in").glob("*.tar"):
        assert (tmp_path / "out" / tar.name).read_bytes() == tar.read_bytes()


BAD_CAPTIONS = {
    "caption too short": (Rules(min_words=3), ["dog", "a dog!", ". . . dog ( cat )"]),
    "caption too long": (Rules(max_words=60), ["word " * 61, "a, b " * 31]),
    "caption in the stop list": (
        Rules(stop=frozenset({"stock photo"})),
        ["Stock photo", "stock  PHOTO!", "stock photo"],
    ),
}


@pytest.mark.parametrize("cause", BAD_CAPTIONS)
def test_a_caption_that_falls_leaves_the_others(cause: str, tmp_path: Path) -> None:
    rules, bad = BAD_CAPTIONS[cause]
    mixed: Made = {f"mixed{i}": (encoded(noise(20 + i)), ["one that is good", text], []) for i, text in enumerate(bad)}
    alone: Made = {f"alone{i}": (encoded(noise(30 + i)), [text], []) for i, text in enumerate(bad)}
    asked: Made = {f"asked{i}": (encoded(noise(40 + i)), [text], ["what?"]) for i, text in enumerate(bad)}
    shards = write(tmp_path / "in", GOOD | mixed | alone | asked)
    report = filter_shards(shards, tmp_path / "out", rules)
    assert report.captions_dropped == {cause: 3 * len(bad)}
    assert report.records_dropped == {"no text left": len(bad)}
    before, after = records(tmp_path / "in"), records(tmp_path / "out")
    assert list(after) == [key for key in before if not key.startswith("alone")]
    for key, record in after.items():
        if key.startswith("mixed"):
            assert record.captions == ["one that is good"]
        elif key not in asked:
            assert record == before[key]
        assert (record.image, record.image_id, record.questions) == (
            before[key].image,
            before[key].image_id,
            before[key].questions,
        )


def test_captions_of_just_as_many_words_as_are_allowed_stay(tmp_path: Path) -> None:
    captions = [
        "two words",
        "now three words",
        "now there are four",
        "now there are five words",
        "now there are no less than",
    ]
    write(tmp_path / "in", {"image": (encoded(noise(1)), captions, [])})
    report = filter_shards(load_index(tmp_path / "in"), tmp_path / "out", Rules(min_words=3, max_words=5))
    assert records(tmp_path / "out")["image"].captions == captions[1:4]
    assert report.captions_dropped == {"caption too short": 1, "caption too long": 1}


def test_small_and_odd_images_fall(tmp_path: Path) -> None:
    sizes = [(40, 100), (100, 40), (39, 100), (100, 39), (120, 40), (121, 40), (40, 121)]
    odd: Made = {f"{w}x{h}": (encoded(noise(w + h, w, h)), ["a caption here"], []) for w, h in sizes}
    report = filter_shards(write(tmp_path / "in", GOOD | odd), tmp_path / "out", Rules(min_side=40, max_aspect=3.0))
    assert report.records_dropped == {"image too small": 2, "odd aspect ratio": 2}
    assert report.captions_dropped == {"with its record": 4}
    assert list(records(tmp_path / "out")) == [*GOOD, "40x100", "100x40", "120x40"]


def test_copies_of_what_was_kept_fall(tmp_path: Path) -> None:
    copies: Made = {
        "recoded": (encoded(noise(0), quality=50), ["a copy of the first"], []),
        "halved": (encoded(noise(1).resize((32, 24))), ["a copy of the second"], []),
        "new": (encoded(noise(70)), ["short"], []),
        "newer": (encoded(noise(70), quality=60), ["a copy of one that has fallen"], []),
    }
    shards = write(tmp_path / "in", GOOD | copies)
    report = filter_shards(shards, tmp_path / "out", Rules(near_duplicates=6, min_words=2))
    assert report.records_dropped == {"near-duplicate": 2, "no text left": 1}
    assert list(records(tmp_path / "out")) == [*GOOD, "newer"]
    assert [example.repeats for example in report.examples["near-duplicate"]] == [0, 1]


def test_only_what_was_kept_makes_a_near_duplicate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = iter([0b0, 0b11, 0b1111, 0b111])  # each near the one before; the third is far from the first
    monkeypatch.setattr("vlm.data.filter.perceptual_hash", lambda _: next(hashes))
    shards = write(tmp_path / "in", dict(list(GOOD.items())[:4]))
    report = filter_shards(shards, tmp_path / "out", Rules(near_duplicates=2))
    assert list(records(tmp_path / "out")) == ["good0", "good2"]
    assert [example.repeats for example in report.examples["near-duplicate"]] == [0, 2]


def test_low_scores_fall_and_no_number_is_low(tmp_path: Path) -> None:
    shards = write(tmp_path / "in", GOOD)
    scores = [[0.9, 0.1], [0.5, 0.5], [0.4, 0.49], [float("nan"), 0.6], None, []]
    report = filter_shards(shards, tmp_path / "out", Rules(min_score=0.5), scores)
    assert report.captions_dropped == {"score too low": 4, "with its record": 2}
    assert report.records_dropped == {"no text left": 1, "undecodable image": 1}
    kept = {key: record.captions for key, record in records(tmp_path / "out").items()}
    first, second = GOOD["good0"][1], GOOD["good1"][1]
    assert kept == {"good0": first[:1], "good1": second, "good3": GOOD["good3"][1][1:], "asked": []}


def test_bad_records_and_images_are_counted(tmp_path: Path) -> None:
    cut = encoded(noise(80, 300, 300), quality=95)
    made = GOOD | {"cut": (cut[:-2000], ["a caption of it"], []), "none": (b"no image", ["a caption of none"], [])}
    shards = write(tmp_path / "in", made)
    tar = tmp_path / "in/shard-000000.tar"
    tar.write_bytes(
        tar.read_bytes().replace(b'{"captions": ["a good caption number 2"', b'{"captions": {"a good caption number 2"')
    )
    report = filter_shards(shards, tmp_path / "all", Rules())
    assert report.records_dropped == {"broken json": 1}
    report = filter_shards(shards, tmp_path / "near", Rules(near_duplicates=0))
    assert report.records_dropped == {"broken json": 1, "undecodable image": 2}
    report = filter_shards(shards, tmp_path / "size", Rules(min_side=1))  # by the header alone
    assert report.records_dropped == {"broken json": 1, "undecodable image": 1}
    page = (tmp_path / "near/dropped.html").read_text()
    assert page.count("no picture") == 2


def test_the_account_adds_up(tmp_path: Path) -> None:
    more: Made = {
        f"m{i}": (encoded(noise(i % 7, 20 + 10 * i, 60)), ["a dog", "a dog on the beach"], []) for i in range(12)
    }
    rules = Rules(min_words=3, min_side=50, max_aspect=2.0, near_duplicates=6)
    report = filter_shards(write(tmp_path / "in", GOOD | more), tmp_path / "out", rules)
    told = json.loads((tmp_path / "out/report.json").read_text())
    for what in ("records", "captions"):
        assert told[what]["read"] == told[what]["kept"] + sum(told[what]["dropped"].values())
    assert told["settings"] == {"min_words": 3, "min_side": 50, "max_aspect": 2.0, "near_duplicates": 6}
    assert load_index(tmp_path / "out").samples == report.records_kept == len(records(tmp_path / "out"))


class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_what_captions_say_and_does_nothing(tmp_path: Path) -> None:
    made: Made = {f"k'<b>{i}": (encoded(noise(i)), [text], []) for i, text in enumerate(EVIL)}
    shards = write(tmp_path / "in<i>", GOOD | made, source="<u>web")
    stop = frozenset(clean_caption(text) for text in EVIL)
    filter_shards(shards, tmp_path / "out", Rules(stop=stop))
    raw = (tmp_path / "out/dropped.html").read_text()
    page = Page(raw)
    names = {tag for tag, _ in page.tags}
    assert names <= {"html", "meta", "title", "style", "h1", "h2", "p", "div", "figure", "img", "small", "i"}
    assert [text for text in EVIL if text not in page.text] == []
    for tag, attributes in page.tags:
        assert set(attributes) <= {"lang", "charset", "title", "alt", "src"}, (tag, attributes)
        assert (attributes.get("src") or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert not re.search(r"https?:|url\(|@import", raw)


def test_the_page_stays_small(tmp_path: Path) -> None:
    made: Made = {f"k{i}": (encoded(noise(i % 3)), ["no"], []) for i in range(120)}
    report = filter_shards(write(tmp_path / "in", GOOD | made), tmp_path / "out", Rules(min_words=3))
    assert report.captions_dropped == {"caption too short": 120}
    numbers = [example.number for example in report.examples["caption too short"]]
    assert len(set(numbers)) == len(numbers) == 40
    assert max(numbers) > 100, "examples come from everywhere"
    assert "120, 40 of them drawn" in (tmp_path / "out/dropped.html").read_text()


def test_equal_input_equal_output(tmp_path: Path) -> None:
    made: Made = {f"k{i}": (encoded(noise(i % 3)), ["no"], []) for i in range(60)}
    shards = write(tmp_path / "in", GOOD | made)
    for name in "ab":
        filter_shards(shards, tmp_path / name, Rules(min_words=3, near_duplicates=4))
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_what_cannot_be_done_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    shards = write(tmp_path / "in", GOOD)
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    with pytest.raises(ConfigError, match="never changed in place"):
        filter_shards(shards, tmp_path / "x/../in", Rules())
    with pytest.raises(UserError, match=r"(?s)nothing would be left.*10 caption too short"):
        filter_shards(
            write(tmp_path / "few", {k: v for k, v in GOOD.items() if v[1]}), tmp_path / "out", Rules(min_words=9)
        )
    with pytest.raises(ConfigError, match="min-score needs scores"):
        filter_shards(shards, tmp_path / "out", Rules(min_score=0.5))
    for settings, message in (
        ({"min_words": 5, "max_words": 4}, "no caption would stay"),
        ({"max_aspect": 0.5}, "at least 1"),
        ({"near_duplicates": 17}, "0 to 16"),
    ):
        with pytest.raises(ConfigError, match=message):
            Rules(**settings)  # type: ignore[arg-type]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        read_stop_list(tmp_path / "latin.txt")
    assert not (tmp_path / "out").exists()
    assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def test_a_shard_that_cannot_be_read_stops_it(tmp_path: Path) -> None:
    shards = write(tmp_path / "in", GOOD)
    (tmp_path / "in/shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar"):
        filter_shards(shards, tmp_path / "out", Rules())
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", GOOD | {"stock": (encoded(noise(50)), ["Stock photo."], [])})
    (tmp_path / "stop.txt").write_text("\ufeffSTOCK PHOTO\n\n")
    out = tmp_path / "out"
    command = ["shards", "filter", str(tmp_path / "in"), "--out", str(out), "--stop-list", str(tmp_path / "stop.txt")]
    assert main([*command, "--near-duplicates"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 6 of 7 records and 10 of 11 captions kept\n")
    assert json.loads((out / "report.json").read_text())["settings"] == {"stop": ["stock photo"], "near_duplicates": 6}
    for scored in (["--worst", "0.1"], ["--min-score", "0.1"], ["--by", "matching"], ["--by", "similarity"]):
        assert main([*command, *scored]) == 2
        assert "--model" in capsys.readouterr().err
