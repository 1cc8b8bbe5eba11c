"""Every kind of image that is read becomes RGB; everything else is refused in one line; transforms keep their promises."""

import io
import pickle
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.data.images import (
    OPERATIONS,
    EvaluationTransform,
    TrainingTransform,
    augment,
    decode_image,
    distort,
    mentions_side,
    to_tensor,
)
from vlm.errors import BadImage


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo(width: int = 40, height: int = 30) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], -1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    form = "PNG" if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "TIFF"
    image = photo() if mode not in ("I", "I;16", "F", "LAB") else photo().convert("L")
    image = Image.new("LAB", (40, 30), (128, 128, 128)) if mode == "LAB" else image.convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(encoded(image, form))
    assert decoded.mode == "RGB"
    assert decoded.size == (40, 30)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_and_path(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{form.lower()}"
    path.write_bytes(encoded(photo(), form))
    expected = Image.open(path).convert("RGB")
    for source in (path, str(path), path.read_bytes()):
        assert decode_image(source).tobytes() == expected.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (60, 40), "white")
    upright.paste((255, 0, 0), (0, 0, 20, 20))  # red stays at the top left
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encoded(stored, "JPEG", exif=exif, quality=95))
    assert decoded.size == (60, 40)
    red, white = decoded.getpixel((8, 8)), decoded.getpixel((50, 30))
    assert red[0] > 200 > 60 > red[1]
    assert min(white) > 200


def test_damaged_exif_does_not_spoil_the_picture() -> None:
    data = encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffnonsense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data).size == (40, 30)


def test_16_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(ramp))))
    assert np.array_equal(decoded[..., 0].ravel(), np.arange(256))
    assert np.array_equal(decoded[..., 0], decoded[..., 2])
    # the same numbers in 32 bits, and floats of either common range
    for same in (ramp.astype(np.int32), (ramp / 65535).astype(np.float32), (ramp / 257).astype(np.float32)):
        assert np.array_equal(np.asarray(decode_image(encoded(Image.fromarray(same), "TIFF"))), decoded)


def test_numbers_beyond_any_range_span_black_to_white() -> None:
    values = np.array([[-1e6, 0.0, np.nan, 1e6]], np.float32)
    assert np.asarray(decode_image(encoded(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 128, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped_as_blip_does(mode: str) -> None:
    image = photo().convert(mode)
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    if mode != "P":
        image.putalpha(7)
    data = encoded(image, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert decode_image(data).tobytes() == expected.tobytes()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    data = encoded(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    assert decode_image(data).getpixel((10, 10)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (2000, 3)])
def test_odd_shapes_pass_every_transform(size: tuple[int, int]) -> None:
    image = decode_image(encoded(Image.new("RGB", size, (10, 200, 30))))
    for transform in (EvaluationTransform(32), TrainingTransform(32, randaugment=(2, 7))):
        tensor = transform(image)
        assert tensor.shape == (3, 32, 32)
        assert tensor.dtype == torch.uint8
    assert EvaluationTransform(32)(image)[:, 16, 16].tolist() == [10, 200, 30]


def bomb(width: int, height: int) -> bytes:
    """A PNG header that announces so many pixels, and no data for them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refusal(source: bytes | Path, **options: int) -> str:
    with pytest.raises(BadImage) as caught:
        decode_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_decompression_bombs_are_refused_unread() -> None:
    assert "too large" in refusal(bomb(50_000, 50_000))
    assert "12000x10000 pixels, at most 1,000" in refusal(bomb(12_000, 10_000), max_pixels=1000)
    assert "too large, 40x30" in refusal(encoded(photo()), max_pixels=1199)
    assert decode_image(encoded(photo()), max_pixels=1200).size == (40, 30)


def test_what_is_no_image(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.jpg").endswith("none.jpg: no such file; expected the path of an image.")
    assert "a folder" in refusal(tmp_path)
    page = tmp_path / "cat.jpg"
    page.write_bytes(b"<html><body>404</body></html>")
    assert "cat.jpg: not an image (the first bytes are '<html><b'); expected JPEG, PNG, WebP" in refusal(page)
    page.write_bytes(b"")
    assert "cat.jpg: empty (0 bytes)" in refusal(page)
    assert refusal(b"\x00\x01").startswith("image: not an image")
    with pytest.raises(BadImage, match=r"^coco/7: not an image"):
        decode_image(b"abc", name="coco/7")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_image_is_refused_at_any_length(form: str) -> None:
    rng = np.random.default_rng(0)
    whole = encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), form)
    for share in (0.1, 0.5, 0.9):
        message = refusal(whole[: int(len(whole) * share)])
        assert "damaged or cut short" in message or "not an image" in message
    assert "JPEG image of 64x64 pixels is damaged" in message or form != "JPEG"


def test_nothing_in_pillow_is_changed() -> None:
    from PIL import ImageFile

    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    for data in (encoded(photo()), b"", b"abc", bomb(12_000, 10_000), encoded(photo(), "JPEG")[:300]):
        with pytest.raises(BadImage):
            decode_image(data, max_pixels=10)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_reduced_decoding_keeps_enough_pixels() -> None:
    data = encoded(photo(1600, 1200), "JPEG")
    assert decode_image(data).size == (1600, 1200)
    assert decode_image(data, at_least=300).size == (400, 300)
    assert decode_image(data, at_least=301).size == (800, 600)
    assert decode_image(data, at_least=5000).size == (1600, 1200)


def test_evaluation_squashes_the_whole_image_as_transformers_blip() -> None:
    from transformers import BlipImageProcessorPil

    image = photo(123, 77)
    processor = BlipImageProcessorPil(
        size={"height": 48, "width": 48}, do_rescale=False, do_normalize=False, do_convert_rgb=True
    )
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(EvaluationTransform(48)(image), expected.to(torch.uint8))
    corner = Image.new("RGB", (100, 20))
    corner.paste((255, 255, 255), (90, 0, 100, 20))
    assert EvaluationTransform(50)(corner)[0, 25, 48] == 255  # nothing is cropped away


def test_training_choices_follow_the_global_generator() -> None:
    transform = TrainingTransform(32, randaugment=(2, 7))
    image = photo()

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return transform(image)

    assert torch.equal(draw(3), draw(3))
    assert len({draw(seed).numpy().tobytes() for seed in range(20)}) > 15
    torch.manual_seed(3)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), draw(3))


def test_crops_keep_to_their_scale() -> None:
    x = np.linspace(0, 255, 200)
    image = Image.fromarray(np.stack(np.broadcast_arrays(x[None], x[:, None], 0), -1).astype(np.uint8))
    transform = TrainingTransform(16, scale=(0.5, 1.0), flip=False)
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        tensor = transform(image).float()
        width = (tensor[0, 8, -1] - tensor[0, 8, 0]) / 255 * 16 / 15
        height = (tensor[1, -1, 8] - tensor[1, 0, 8]) / 255 * 16 / 15
        shares.append(float(width * height))
    assert min(shares) > 0.45
    assert max(shares) < 1.05
    assert 0.7 < np.mean(shares) < 0.8


def test_flips_half_the_time_and_only_where_allowed() -> None:
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 16, 32))  # white on the left

    def mirrored(transform: TrainingTransform, seed: int, allow: bool) -> bool:
        torch.manual_seed(seed)
        return bool(transform(image, allow_flip=allow)[0, 8, 0] < 128)

    flipping = TrainingTransform(16, scale=(1.0, 1.0))
    count = sum(mirrored(flipping, seed, True) for seed in range(200))
    assert abs(count - 100) < 3 * 50**0.5
    assert not any(mirrored(flipping, seed, False) for seed in range(50))
    assert not any(mirrored(TrainingTransform(16, scale=(1.0, 1.0), flip=False), seed, True) for seed in range(50))


def test_a_forbidden_flip_leaves_the_other_choices() -> None:
    image = photo()
    flips = TrainingTransform(24, randaugment=(2, 7))
    for seed in range(10):
        torch.manual_seed(seed)
        flips(image, allow_flip=True)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        flips(image, allow_flip=False)
        assert torch.equal(torch.get_rng_state(), state)


def test_sides_are_found_in_words() -> None:
    assert mentions_side(["a dog", "a man on the LEFT."])
    assert mentions_side(["the right-hand side"])
    assert mentions_side(["leftmost cup"])
    assert not mentions_side(["a bright light", "a cleft", "uprights"])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_augmentation_never_swaps_colours(operation: str) -> None:
    for hue, (r, g, b) in {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 50, 210)}.items():
        image = Image.new("RGB", (32, 32), (90, 90, 90))
        image.paste((r, g, b), (8, 8, 24, 24))
        image.paste((255, 255, 255), (0, 0, 4, 4))
        image.paste((0, 0, 0), (28, 28, 32, 32))
        for strength in (-1.0, 1.0):
            pixel = to_tensor(distort(image, operation, strength))[:, 16, 16].tolist()
            assert ["red", "green", "blue"][int(np.argmax(pixel))] == hue


def test_magnitude_zero_keeps_the_geometry() -> None:
    image = photo()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    for operation in set(OPERATIONS) - {"autocontrast", "equalize"}:
        assert np.abs(np.asarray(distort(image, operation, 0.0), int) - np.asarray(image, int)).max() <= 1
        if operation != "identity":
            assert distort(noise, operation, 1.0).tobytes() != noise.tobytes(), operation


def test_shifts_and_shears_move_as_they_say() -> None:
    image = Image.new("RGB", (40, 40))
    image.paste((255, 255, 255), (18, 18, 22, 22))
    grey = np.array([128, 128, 128])

    def centre(moved: Image.Image) -> tuple[float, float]:
        white = np.argwhere(np.asarray(moved)[..., 0] > 200)
        return float(white[:, 1].mean()), float(white[:, 0].mean())

    assert centre(distort(image, "shift_x", 1.0)) == pytest.approx((23.5, 19.5))
    assert centre(distort(image, "shift_y", -1.0)) == pytest.approx((19.5, 15.5))
    for operation in ("shear_x", "shear_y", "rotate"):
        moved = distort(image, operation, 1.0)
        assert centre(moved) == pytest.approx((19.5, 19.5), abs=0.6)
        assert (np.asarray(moved).reshape(-1, 3) == grey).all(1).any()


def test_augment_draws_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []

    def record(image: Image.Image, operation: str, m: float) -> Image.Image:
        seen.append((operation, m))
        return image

    monkeypatch.setattr("vlm.data.images.distort", record)
    torch.manual_seed(0)
    for _ in range(500):
        augment(photo(), 2, 7)
    assert abs(len(seen) - 500) < 3 * 250**0.5  # half of 1000
    assert {name for name, _ in seen} == set(OPERATIONS)
    assert {m for _, m in seen} == {0.7, -0.7}
