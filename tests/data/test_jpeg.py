"""Training's way from bytes to pixels: the numbers of Pillow's, with and without the faster decoder, and its refusals."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.data import jpeg
from vlm.data.images import TrainingTransform, decode_image
from vlm.data.jpeg import decode_pixels
from vlm.errors import BadImage


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with some noise, so that every step of a decoder has something to do."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / 40
    waves = np.stack([np.sin(x) + np.cos(y), np.cos(x + y), np.sin(x - y)], -1)
    return Image.fromarray(np.clip(128 + 60 * waves + draw.normal(0, 6, waves.shape), 0, 255).astype(np.uint8))


def saved(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(photo(60, 40), exif=exif)


@pytest.fixture
def fast() -> None:
    pytest.importorskip("simplejpeg")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images Pillow decoded."""
    calls: list[int] = []

    def decode(*given: object, **options: object) -> Image.Image:
        calls.append(1)
        return decode_image(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(jpeg, "decode_image", decode)
    return calls


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 40}]
)
@pytest.mark.parametrize("at_least", [None, 50, 60, 97, 133, 199])
def test_the_faster_decoder_gives_pillows_numbers(
    options: dict[str, object], at_least: int | None, counted: list[int]
) -> None:
    data = saved(photo(533, 401), **options)
    pixels = decode_pixels(data, at_least=at_least)
    assert not counted
    assert np.array_equal(pixels, np.asarray(decode_image(data, at_least=at_least)))
    assert min(pixels.shape[:2]) >= (at_least or 401)


@pytest.mark.usefixtures("fast")
def test_what_is_no_plain_jpeg_is_left_to_pillow(counted: list[int]) -> None:
    odd = [
        saved(photo(60, 40), "PNG"),
        saved(photo(60, 40).convert("L")),
        saved(photo(60, 40).convert("CMYK")),
        *map(turned, (3, 6)),
    ]
    for number, data in enumerate(odd, 1):
        assert np.array_equal(decode_pixels(data), np.asarray(decode_image(data)))
        assert len(counted) == number
    decode_pixels(turned(1))
    assert len(counted) == len(odd)


@pytest.mark.parametrize("installed", [True, False])
def test_damage_is_refused_with_and_without_it(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed:
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)
    data = saved(photo(200, 150))
    for bad in (b"", b"\xff\xd8", data[: len(data) // 2], data[:-40], b"<html>"):
        with pytest.raises(BadImage, match=r"^here: "):
            decode_pixels(bad, "here")
    good = decode_pixels(data, "here")
    assert np.array_equal(good, np.asarray(decode_image(data)))
    assert good.flags.writeable


def test_torchs_resize_is_pillows() -> None:
    """A mean difference of 2/255 is what DESIGN allows; full crops leave out the edges, where Pillow looks over the crop's border."""
    for width, height in ((640, 480), (301, 900), (90, 70)):
        image = photo(width, height)
        transform = TrainingTransform(64, scale=(1.0, 1.0), flip=False)
        torch.manual_seed(1)
        box = transform.crop.make_params([torch.empty(3, height, width)])
        corners = (box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"])
        want = np.asarray(image.crop(corners).resize((64, 64), Image.Resampling.BICUBIC), int)
        torch.manual_seed(1)
        difference = np.abs(transform(image).permute(1, 2, 0).numpy() - want)
        assert difference.max() <= 1
        assert difference.mean() < 0.05
