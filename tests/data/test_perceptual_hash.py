"""The hash stays nearly the same in a copy and not in another picture; neighbours are those of a comparison with all."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm.data.perceptual_hash import NearDuplicates, perceptual_hash


def picture(seed: int, width: int = 240, height: int = 180) -> Image.Image:
    """Like a photograph in that large shapes are strong and small ones weak."""
    draw = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (3, 6, 12, 24, 48):
        noise = draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)) / cells
    return Image.fromarray((total / total.max() * 255).astype(np.uint8))


def encoded(image: Image.Image, **settings: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **settings)
    return Image.open(buffer)


def distance(one: Image.Image, other: Image.Image) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


def test_copies_are_near_and_other_pictures_are_not() -> None:
    pictures = [picture(seed) for seed in range(12)]
    for image in pictures:
        assert distance(image, encoded(image, quality=40)) <= 6
        assert distance(image, encoded(image.resize((90, 60)), quality=80)) <= 6
        assert distance(image, image.resize((800, 900), Image.Resampling.BICUBIC)) <= 6
        assert distance(image, image.convert("L")) <= 2
    hashes = [perceptual_hash(image) for image in pictures]
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 8


def test_pictures_without_anything_on_them_are_alike() -> None:
    assert len({perceptual_hash(Image.new("RGB", (50, 40), (shade, 7, 99))) for shade in range(0, 256, 5)}) == 1


@pytest.mark.parametrize("bits", [0, 1, 3, 6, 16])
def test_the_earliest_neighbour_is_found_as_by_comparing_with_all(bits: int) -> None:
    draw = np.random.default_rng(bits)
    known: list[int] = []
    near = NearDuplicates(bits)
    found = 0
    for number in range(1100):  # more than the arrays begin with
        value = int(draw.integers(0, 2**64, dtype=np.uint64))
        if known and number % 2:
            value = known[int(draw.integers(len(known)))]
            for place in draw.permutation(64)[: int(draw.integers(0, bits + 3))]:
                value ^= 1 << int(place)
        row = next((i for i, other in enumerate(known) if (other ^ value).bit_count() <= bits), None)
        assert near.find(value) == (None if row is None else 10 * row)
        found += row is not None
        near.add(value, 10 * len(known))
        known.append(value)
    assert found > 100
