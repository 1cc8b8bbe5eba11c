"""Images as pixels, for training: JPEGs through simplejpeg where it is installed (the extra `fast`), all else as decode_image.

Both are libjpeg-turbo, and give the same numbers. simplejpeg writes straight into an array, where Pillow copies twice (benchmarks/loader.py).
"""

import io
import warnings
from functools import cache
from types import ModuleType

import numpy as np
from PIL import Image

from vlm.data.images import MAX_PIXELS, ORIENTATION, decode_image


def decode_pixels(data: bytes, name: str | None = None, at_least: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8 of what `decode_image` gives for a file's bytes. Raises BadImage as that does."""
    pixels = _from_jpeg(data, at_least)
    return np.array(decode_image(data, name=name, at_least=at_least)) if pixels is None else pixels


def _from_jpeg(data: bytes, at_least: int | None) -> np.ndarray | None:
    """The pixels of a plain RGB JPEG that is upright, and None for all others: Pillow then decodes it, or says what is wrong."""
    simplejpeg = _simplejpeg()
    if simplejpeg is None or not data.startswith(b"\xff\xd8"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=("JPEG",))  # its header
            turned = image.getexif().get(ORIENTATION, 1) != 1
        width, height = image.size
        if image.format != "JPEG" or image.mode != "RGB" or turned or width * height > MAX_PIXELS:
            return None
        room = 1 if at_least is None else min(width // at_least, height // at_least)
        scale = next((s for s in (8, 4, 2) if s <= room), 1)  # those that Pillow's draft has
        # strict: damage that Pillow might refuse is left to it
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            data, "RGB", min_height=-(-height // scale), min_width=-(-width // scale), min_factor=1, strict=True
        )
    except Exception:
        return None
    return pixels


@cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    module: ModuleType = simplejpeg
    return module
