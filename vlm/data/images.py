"""Images: from bytes or a file to RGB, and from RGB to a square uint8 tensor, for evaluation and for training."""

import io
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vlm.errors import BadImage

if TYPE_CHECKING:  # decoding works without PyTorch: `vlm.onnx.runner` does
    from torch import Tensor

MAX_PIXELS = 178_956_970
"""Larger images are refused unread: Pillow's own limit. One of this size takes 683 MiB as RGB, 4 bytes a pixel; its decoding to an array was measured
to take at its peak 3 to 11 bytes a pixel from JPEG, 10 to 13 from PNG and TIFF of any depth, up to 20 (3.3 GiB) from WebP and JPEG 2000."""

ORIENTATION = 0x0112
_GREY = (128, 128, 128)
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of what is read. It knows more formats, seldom of photographs, and runs Ghostscript for EPS. AVIF is last: an old Pillow lacks it,
which is a KeyError for a file that is none of the others."""
_EXPECTED = "expected JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF"
_STRIP = 2**18  # pixels scaled at one time


def decode_image(
    source: bytes | str | Path | Image.Image,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    at_least: int | None = None,
) -> Image.Image:
    """Decode a file, its bytes or what Pillow opened to RGB, in full and turned as its EXIF orientation says; the first frame of an animation.

    Transparency is dropped and not composed on a background, as `convert("RGB")` and therefore BLIP's processing have it. Greyscale of 16 and
    32 bits is scaled to 8 bits by its range, where Pillow would clip it.

    name: what messages call the image, by default its path. at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long
    as both sides keep this many pixels: faster, other pixels, hence for training only.

    Raises BadImage with one line when the image is missing, empty, truncated, no image, or has more than `max_pixels` pixels.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "image")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow's, on size, odd EXIF blocks and palettes: what matters here is an error
        image = source if isinstance(source, Image.Image) else _open(source, name)
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(
                f"{name}: too large, {width}x{height} pixels, at most {max_pixels:,} are read; reduce the image."
            )
        try:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            return _to_rgb(_upright(image))
        except Exception as error:  # Pillow's decoders raise whatever their format's damage leads to
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BadImage(
                f"{name}: the {image.format} image of {width}x{height} pixels is damaged or cut short ({reason}); "
                "get the file again."
            ) from error


def read_header(data: bytes, name: str = "image") -> tuple[str, int, int]:
    """Pillow's name of the format, width and height as stored, without decoding. Raises BadImage where it is no image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data, name)
        return image.format or "unknown", image.width, image.height


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadImage(f"{name}: no such file; expected the path of an image.") from error
    except IsADirectoryError as error:
        raise BadImage(f"{name}: a folder; expected the path of an image.") from error
    except OSError as error:
        raise BadImage(f"{name}: cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # a zero byte, as in the output of `find -print0`
        raise BadImage(f"{name!r}: no file can have this name ({error}); expected the path of an image.") from error


def _open(source: bytes | str | Path, name: str) -> Image.Image:
    """Read the header only, so that a decompression bomb is refused before it takes memory."""
    data = source if isinstance(source, bytes) else _read(Path(source), name)
    if not data:
        raise BadImage(f"{name}: empty (0 bytes); {_EXPECTED}.")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage(f"{name}: too large, more than {MAX_PIXELS:,} pixels; reduce the image.") from error
    except Exception as error:
        if kind := _other_format(data):
            raise BadImage(f"{name}: the format is {kind}; {_EXPECTED}. Convert the image.") from error
        raise BadImage(f"{name}: not an image (the first bytes are {_show(data)}); {_EXPECTED}.") from error


def _other_format(data: bytes) -> str | None:
    """Pillow's name of the format that is not read, if the first bytes are of one; no more of the file is looked at."""
    for kind, (_, accepts) in Image.OPEN.items():
        try:
            if kind not in FORMATS and accepts is not None and accepts(data[:16]):
                return kind
        except Exception:  # too few bytes for this one
            continue
    return None


def _show(data: bytes) -> str:
    return repr(data[:8])[1:]


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # a damaged EXIF block does not spoil the picture
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif image.mode in ("RGBa", "La"):  # premultiplied: there is no direct way
        image = image.convert(image.mode.upper())
    elif image.mode == "LAB":
        return _lab_to_rgb(image)
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Greyscale of any depth to uint8, by the range of its type: 65,535 for 16 bits and integers that keep to it; 1 or 255 for floats that keep
    to it; anything else by its own extremes."""
    flat, scaled = pixels.reshape(-1), np.empty(pixels.size, np.uint8)
    # in strips: float64 of all pixels at one time would take ten times the room of the image
    strips = [slice(start, start + _STRIP) for start in range(0, pixels.size, _STRIP)]
    ends = [(values.min(), values.max()) for values in (_numbers(flat[strip]) for strip in strips)]
    low, high = float(min(end[0] for end in ends)), float(max(end[1] for end in ends))
    ranges = (1.0, 255.0, 65535.0) if pixels.dtype.kind == "f" else (65535.0,)
    if low >= 0:
        low, high = 0.0, next((limit for limit in ranges if high <= limit), high)
    factor = 255 / max(high - low, 1e-12)
    for strip in strips:
        scaled[strip] = np.clip(np.rint((_numbers(flat[strip]) - low) * factor), 0, 255)
    return scaled.reshape(pixels.shape)


def _numbers(pixels: np.ndarray) -> np.ndarray:
    return np.nan_to_num(pixels.astype(np.float64))


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, rgb, "LAB", "RGB"))
    assert converted is not None
    return converted


def to_tensor(image: Image.Image) -> "Tensor":
    """uint8 (3, H, W) of an RGB image."""
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def mentions_side(texts: Iterable[str]) -> bool:
    """True where a text says left or right: mirroring its image would make it wrong."""
    return any(_SIDES.search(text) for text in texts)


class EvaluationTransform:
    """Squash the whole image to the square, as BLIP does; nothing is cropped. RGB image -> uint8 (3, size, size)."""

    def __init__(self, size: int, interpolation: str = "bicubic") -> None:
        """size: side in pixels; interpolation: Pillow's name in lower case."""
        self.size = size
        self.interpolation = Image.Resampling[interpolation.upper()]

    def __call__(self, image: Image.Image, allow_flip: bool = False) -> "Tensor":  # noqa: ARG002
        """`allow_flip` has no influence; the training transform takes it."""
        return to_tensor(image.resize((self.size, self.size), self.interpolation))


class TrainingTransform:
    """A random crop resized to the square, perhaps mirrored, perhaps distorted. RGB image, or its pixels (H, W, 3) uint8 -> uint8 (3, size, size).

    All choices come from torch's global generator: the caller seeds it. The crop is resized by torch, which has Pillow's filter in vector
    instructions: 0.005 of 255 from Pillow's on average, at a quarter of the time (benchmarks/loader.py).

    at_least: how many pixels a side a reduced decoding must keep so that even the smallest crop is not enlarged for it (see `decode_image`).
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = True,
        randaugment: tuple[int, float] | None = None,
        reduced_decoding: bool = True,
    ) -> None:
        """scale: range of the crop's share of the area. randaugment: how many operations are drawn, and their magnitude from 0 to 10."""
        from torchvision.transforms import v2

        self.size = size
        self.flip = flip
        self.randaugment = randaugment
        ratio = (3 / 4, 4 / 3)
        self.crop = v2.RandomResizedCrop(size, scale=scale, ratio=ratio)
        self.at_least = int(np.ceil(size / (scale[0] * ratio[0]) ** 0.5)) if reduced_decoding else None

    def __call__(self, image: Image.Image | np.ndarray, allow_flip: bool = True) -> "Tensor":
        """allow_flip: false where a text of this image says left or right (see `mentions_side`)."""
        import torch
        from torch.nn.functional import interpolate

        pixels = torch.from_numpy(image if isinstance(image, np.ndarray) else np.array(image)).permute(2, 0, 1)
        box = self.crop.make_params([pixels])
        top, left = box["top"], box["left"]
        part = pixels[None, :, top : top + box["height"], left : left + box["width"]]
        cut = interpolate(part, (self.size, self.size), mode="bicubic", antialias=True)[0]
        mirrored = bool(torch.rand(()) < 0.5)  # always drawn, so that the choices after it do not depend on the texts
        if mirrored and self.flip and allow_flip:
            cut = cut.flip(2)
        if self.randaugment is not None:
            picture = Image.fromarray(cut.permute(1, 2, 0).contiguous().numpy())
            return to_tensor(augment(picture, *self.randaugment))
        return cut.contiguous()


def augment(image: Image.Image, operations: int, magnitude: float) -> Image.Image:
    """RandAugment (Cubuk et al. 2020) without the operations that change colours, which captions name: the ten of ALBEF.

    Each of the `operations` drawn is applied half the time. magnitude: 0 (nothing) to 10; signs are drawn.
    """
    import torch

    for _ in range(operations):
        choice = int(torch.randint(len(OPERATIONS), ()))
        applied, sign = (torch.rand(2) < 0.5).tolist()
        if applied:
            image = distort(image, OPERATIONS[choice], (-magnitude if sign else magnitude) / 10)
    return image


OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "shift_x",
    "shift_y",
    "rotate",
)


def distort(image: Image.Image, operation: str, m: float) -> Image.Image:
    """One of OPERATIONS at strength m, from -1 to 1."""
    match operation:
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(1 + 0.5 * m)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(1 + 0.9 * m)
        case "shear_x":
            return _affine(image, shear=(0.3 * m, 0))
        case "shear_y":
            return _affine(image, shear=(0, 0.3 * m))
        case "shift_x":
            return _affine(image, shift=(0.1 * m, 0))
        case "shift_y":
            return _affine(image, shift=(0, 0.1 * m))
        case "rotate":
            return image.rotate(30 * m, Image.Resampling.BILINEAR, fillcolor=_GREY)
    return image


def _affine(
    image: Image.Image, shift: tuple[float, float] = (0.0, 0.0), shear: tuple[float, float] = (0.0, 0.0)
) -> Image.Image:
    """Shift by shares of width and height, shear by tangents about the centre; what was outside is grey."""
    (x, y), (a, b) = shift, shear
    w, h = image.size
    output_to_input = (1.0, a, -a * h / 2 - x * w, b, 1.0, -b * w / 2 - y * h)
    return image.transform(
        image.size, Image.Transform.AFFINE, output_to_input, Image.Resampling.BILINEAR, fillcolor=_GREY
    )
