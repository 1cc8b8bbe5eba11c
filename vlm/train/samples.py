"""What a model says of some pictures, for people to look at: as one page of HTML, and as single pictures for trackers."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm.data.page import embedded, short, write_page

SIDE = 260


@dataclass(frozen=True)
class Said:
    """One thing that the model said. label: what it was to say. note: how sure it was, or what people said. right: where that is known."""

    label: str
    text: str
    note: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Sample:
    """A picture as JPEG bytes, its record's key, what the model said of it, and the texts that people wrote."""

    picture: bytes
    key: str
    said: tuple[Said, ...]
    references: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All in a few lines."""
        lines = [f"{one.label}: {one.text}" + (f" ({one.note})" if one.note else "") for one in self.said]
        return "\n".join([*lines, *(f"- {text}" for text in self.references)])


def open_picture(sample: Sample) -> Image.Image:
    """The picture as RGB."""
    return Image.open(io.BytesIO(sample.picture)).convert("RGB")


def labelled(sample: Sample) -> Image.Image:
    """The picture with its texts drawn below, for those who can show no text beside a picture."""
    picture, font = open_picture(sample), ImageFont.load_default(13)
    lines = [part for line in sample.text.splitlines() for part in textwrap.wrap(line, 2 * SIDE // 13) or [""]]
    sheet = Image.new("RGB", (SIDE + 10, picture.height + 16 * len(lines) + 10), "white")
    sheet.paste(picture, (5, 5))
    ImageDraw.Draw(sheet).multiline_text((5, picture.height + 8), "\n".join(lines), fill="black", font=font, spacing=3)
    return sheet


def write_samples(path: Path, title: str, samples: Mapping[str, Sequence[Sample]]) -> None:
    """One HTML file with everything in it, the pictures too. samples: by the name of their set.

    Raises:
        UserError: it cannot be written.
    """
    sections = [
        f"<h2>{escape(name)}</h2>\n<div>\n" + "\n".join(map(_figure, chosen)) + "\n</div>"
        for name, chosen in samples.items()
    ]
    write_page(path, title, _STYLE, f"<h1>{escape(title)}</h1>\n" + "\n".join(sections))


def _figure(sample: Sample) -> str:
    said = "".join(map(_said, sample.said))
    references = "".join(f"<li>{short(text)}</li>" for text in sample.references)
    listed = f"<ul>{references}</ul>" if references else ""
    return f"<figure>{embedded(sample.picture)}{said}{listed}<small>{short(sample.key)}</small></figure>"


def _said(one: Said) -> str:
    kind = {None: "", True: " class=right", False: " class=wrong"}[one.right]
    note = f" <small>{short(one.note)}</small>" if one.note else ""
    return f"<p><small>{short(one.label)}</small> <b{kind}>{short(one.text)}</b>{note}</p>"


_STYLE = (
    "body{max-width:90em}div{display:flex;flex-wrap:wrap;gap:1em}figure{width:18em}"
    "p{margin:.5em 0}p small:first-child{display:block}ul{margin:.3em 0;padding-left:1.2em;color:#555}"
    ".right{color:#17702b}.wrong{color:#b3261e}img{display:block;margin:0 auto .4em;max-width:100%}"
)
