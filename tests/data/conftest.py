"""Toy shards and a toy encoder for the loader's tests: no image is decoded, every sample says what it is."""

import io
import tarfile
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch

from vlm.data.collate import EncodedSample, EncodedText, SampleEncoder
from vlm.data.loader import Loader
from vlm.data.random import keyed_generator
from vlm.data.records import Record
from vlm.data.shards import ShardSet, ShardWriter, load_index
from vlm.errors import BadImage


class ToyEncoder(SampleEncoder):
    """The image is random by key and epoch, the text one of the captions drawn by key; bytes that do not begin with "img" cannot be decoded."""

    pad_id = 0

    def texts(self, record: Record, epoch: int) -> list[EncodedText]:
        draw = keyed_generator(7, epoch, record.source, record.key, "text")
        texts = [*record.captions, *(q["question"] for q in record.questions)]
        text = texts[int(torch.randint(len(texts), (), generator=draw))]
        ids = [2, *(5 + ord(c) % 90 for c in text), 3]
        masked, answers = [2, 4, *ids[2:]], [([2, 9, 3], 1.0)]
        return [EncodedText(ids, source={"text": text}, masked_ids=masked, masked_at=[1], answers=answers)]

    def sample(self, record: Record, epoch: int, texts: list[EncodedText]) -> EncodedSample:
        if not record.image.startswith(b"img"):
            raise BadImage(f"{record.source}/{record.key} is not an image.")
        draw = keyed_generator(7, epoch, record.source, record.key, "image")
        image = torch.randint(0, 256, (3, 4, 4), generator=draw, dtype=torch.uint8)
        return EncodedSample(record.key, record.image_id, image, texts)


@pytest.fixture
def encode() -> ToyEncoder:
    return ToyEncoder()


@pytest.fixture
def write_set(tmp_path: Path) -> Callable[..., ShardSet]:
    """write_set(name, samples, samples_per_shard, broken): toy records k000, k001, ... of a source of that name, without an image where broken."""

    def write(
        name: str = "toy", samples: int = 20, samples_per_shard: int = 6, broken: Collection[int] = ()
    ) -> ShardSet:
        with ShardWriter(tmp_path / name, name, samples_per_shard) as writer:
            for i in range(samples):
                image = b"none" if i in broken else b"img%d" % i
                captions = [f"caption {i}" + "!" * (i % 11), f"other {i}"]
                writer.write(f"k{i:03d}", image, captions=captions, image_id=i)
        return load_index(tmp_path / name)

    return write


@pytest.fixture
def make_loader(encode: ToyEncoder) -> Callable[..., Loader]:
    """make_loader(*sets, batch_size=..., ...): small streams and blocks unless told otherwise."""

    def make(*sets: ShardSet, batch_size: int = 4, **settings: int | bool | float) -> Loader:
        return Loader(sets, encode, batch_size, **{"seed": 1, "streams": 4, "shuffle_block": 3, **settings})  # type: ignore[arg-type]

    return make


@pytest.fixture
def write_tar() -> Callable[..., None]:
    """write_tar(path, {member name: bytes}): a tar as anyone may have made it."""

    def write(path: Path, members: dict[str, bytes]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    return write
