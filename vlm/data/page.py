"""What the HTML pages share: each is one file with everything in it, pictures too, and runs nothing."""

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from vlm.data.images import decode_image
from vlm.errors import BadImage
from vlm.files import replace_text

LONGEST = 300  # letters of a text


def short(text: str) -> str:
    """Escaped for a page, and cut where it is too long."""
    return escape(text if len(text) <= LONGEST else f"{text[:LONGEST]} …")


def thumbnail(image: Image.Image, side: int) -> bytes:
    """A JPEG of an RGB image, which is made small: `side` pixels at most."""
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def picture(data: bytes, side: int) -> str:
    """The tag of a small picture of an encoded image; words where it cannot be decoded."""
    try:
        return embedded(thumbnail(decode_image(data, at_least=side), side))
    except BadImage:
        return NO_PICTURE


def embedded(jpeg: bytes) -> str:
    """The tag of a picture that is part of the page."""
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def write_page(path: Path, title: str, style: str, body: str) -> None:
    """Writes a page. title: plain. style: rules beside those that all pages have. body: HTML.

    Raises:
        UserError: it cannot be written.
    """
    head = f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n"
    # what is not UTF-8 in a caption or a file's name has half characters, which no page can hold
    replace_text(path, f"{head}{body}\n</html>\n".encode("utf-8", "replace").decode())


NO_PICTURE = "<i>no picture</i>"
_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2em}figure{margin:0;padding:.6em;border:1px solid #ccc;border-radius:4px;overflow-wrap:anywhere}"
    "small{color:#666}"
)
