"""Pages of samples: everything that strangers wrote is escaped, pictures are in the file, long texts are cut."""

import base64
import io
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from vlm.data.page import thumbnail
from vlm.train.samples import SIDE, Said, Sample, labelled, open_picture, write_samples

NASTY = '<script>alert("x")</script> & \udce9 "quoted"'


class Reader(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def sample(width: int = 600, height: int = 300) -> Sample:
    picture = thumbnail(Image.new("RGB", (width, height), "green"), SIDE)
    said = (Said("is it <b>?", "no", "50%; people: yes x 3", False), Said("caption", NASTY), Said("x", "y", right=True))
    return Sample(picture, NASTY, said, (NASTY, "w" * 400))


def test_the_page_shows_everything_and_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep/step-000001.html"
    write_samples(path, "run <1>, step 1", {"set & <co>": [sample(), sample()]})
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert "script" not in reader.tags
    assert (reader.tags.count("figure"), reader.tags.count("img")) == (2, 2)
    assert "set & <co>" in reader.text
    assert unescape(NASTY.replace("\udce9", "?")) in reader.text
    assert "w" * 300 + " …" in reader.text
    assert "w" * 301 not in reader.text
    assert (text.count("class=wrong>no"), text.count("class=right>y")) == (2, 2)
    assert not re.findall(r'(?:src|href)="(?!data:)', text)  # nothing is fetched
    data = re.findall(r"base64,([^\"]+)", text)[0]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (image.format, image.size) == ("JPEG", (SIDE, SIDE // 2))


def test_texts_stand_below_a_labelled_picture() -> None:
    plain, high = labelled(Sample(sample().picture, "k", (Said("caption", "a dog"),))), labelled(sample())
    assert plain.width == high.width
    assert high.height > plain.height > open_picture(sample()).height
    below = plain.crop((0, open_picture(sample()).height + 5, plain.width, plain.height))
    assert below.convert("L").getextrema()[0] < 100  # something is written there


def test_the_lines_of_a_sample() -> None:
    assert sample().text.splitlines()[0] == "is it <b>?: no (50%; people: yes x 3)"
    assert sample().text.splitlines()[2:4] == ["x: y", f"- {NASTY}"]
