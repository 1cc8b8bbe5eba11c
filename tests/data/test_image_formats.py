"""Formats beside those of photographs are refused unread; deep greyscale becomes 8 bits in little memory, by the same numbers as all at one time."""

import io
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from vlm.data import images
from vlm.data.images import FORMATS, decode_image, read_header
from vlm.data.jpeg import decode_pixels
from vlm.errors import BadImage


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", [*FORMATS, "MPO"])
def test_the_formats_of_photographs_are_read(form: str) -> None:
    Image.init()
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {form}")
    picture = Image.new("RGB", (40, 30), (10, 200, 30))
    more = {"save_all": True, "append_images": [picture]} if form == "MPO" else {}
    data = encoded(picture, form, **more)
    assert decode_image(data).size == (40, 30)
    assert decode_pixels(data).shape == (30, 40, 3)
    assert read_header(data) == (form, 40, 30)


@pytest.mark.parametrize("form", ["EPS", "ICO", "PCX", "SGI", "XBM", "DDS"])
def test_other_formats_are_refused_by_name(form: str, tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    picture = Image.new("1" if form == "XBM" else "RGB", (40, 30))
    path.write_bytes(encoded(picture, form))
    says = f"cat.jpg: the format is {form}; expected JPEG, PNG, WebP, .* or AVIF. Convert the image.$"
    with pytest.raises(BadImage, match=says):
        decode_image(path)
    for refusing in (decode_image, decode_pixels, read_header):
        with pytest.raises(BadImage, match=f"^coco/7: the format is {form};"):
            refusing(path.read_bytes(), name="coco/7")


def test_no_other_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    data = encoded(Image.new("RGB", (40, 30)), "EPS")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(subprocess, "check_call", run)
    with pytest.raises(BadImage, match="the format is EPS"):
        decode_image(data)


def test_a_pillow_without_avif_refuses_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF")
    assert decode_image(encoded(Image.new("RGB", (40, 30)), "WEBP")).size == (40, 30)
    for data, says in (
        (b"\0\0\0 ftypavif\0\0\0\0mif1", "not an image"),
        (b"abc", "not an image"),
        (b"%!PS-Adobe", "EPS"),
    ):
        with pytest.raises(BadImage, match=says):
            decode_image(data)


def at_one_time(pixels: np.ndarray) -> np.ndarray:
    """What `_to_8_bits` does in strips."""
    values = np.nan_to_num(pixels.astype(np.float64))
    low, high = float(values.min()), float(values.max())
    ranges = (1.0, 255.0, 65535.0) if pixels.dtype.kind == "f" else (65535.0,)
    if low >= 0:
        low, high = 0.0, next((limit for limit in ranges if high <= limit), high)
    scaled = (values - low) * (255 / max(high - low, 1e-12))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def deep(mode: str, top: float, low: float = 0.0, shape: tuple[int, int] = (700, 801)) -> np.ndarray:
    kind = {"I;16": np.uint16, "I;16B": ">u2", "I": np.int32, "F": np.float32}[mode]
    return np.random.default_rng(0).uniform(low, top, shape).astype(kind)


@pytest.mark.parametrize(
    ("mode", "low", "top"),
    [
        ("I;16", 0, 65536),
        ("I;16", 0, 200),
        ("I;16B", 0, 65536),
        ("I", 0, 65536),
        ("I", 0, 2**31),
        ("I", -(2**31), 2**31),
        ("I", -500, -3),
        ("F", 0, 1),
        ("F", 0, 255),
        ("F", 0, 65535),
        ("F", 0, 1e9),
        ("F", -3, 3),
        ("F", 0, 0),
    ],
)
def test_strips_give_the_same_numbers(mode: str, low: float, top: float) -> None:
    pixels = deep(mode, top, low)
    assert pixels.size > 2 * images._STRIP
    if mode == "F":
        pixels[5, 7] = pixels[-1, -1] = np.nan
    expected = at_one_time(pixels)
    assert np.array_equal(images._to_8_bits(pixels), expected)
    if mode != "I;16B":
        decoded = np.asarray(decode_image(encoded(Image.fromarray(pixels), "TIFF")))
        assert np.array_equal(decoded, np.repeat(expected[..., None], 3, -1))


def test_every_number_of_16_bits_and_tiny_images() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(images._to_8_bits(every), at_one_time(every))
    for shape in ((1, 1), (1, 3), (3, 1)):
        pixels = deep("I;16", 65536, shape=shape)
        assert np.array_equal(images._to_8_bits(pixels), at_one_time(pixels))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_greyscale_takes_little_memory(mode: str) -> None:
    """Beside what Pillow itself holds, which is no more than for a photograph in colours."""
    pixels = deep(mode, 60_000, shape=(1500, 1500))
    data = encoded(Image.fromarray(pixels), "PNG" if mode == "I;16" else "TIFF")
    decode_image(data)
    tracemalloc.start()
    try:
        decode_image(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 14 * pixels.size
