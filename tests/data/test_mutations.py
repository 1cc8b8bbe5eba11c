"""Damage at random: whatever is done to a shard, training keeps its steps and shapes or stops with one line; nothing hangs, grows or is written."""

import io
import os
import random
import resource
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vlm.data.collate import EncodedSample, EncodedText, SampleEncoder
from vlm.data.images import decode_image
from vlm.data.index import ShardInfo, ShardSet, load_index
from vlm.data.loader import Loader
from vlm.data.records import BadRecord, Record, ShardReader, scan_shard
from vlm.errors import UserError

RECORDS = 12
TYPES = b"0125xgLKSD7\0"
NAMES = [
    b"../../evil.jpg",
    b"/tmp/evil.jpg",
    b"k000.jpg",
    b"\x1f\x8b.jpg",
    b"a/../b.json",
    b"\xff\xfe.txt",
    b".jpg",
    b"",
]
SIZES = [
    b"77777777777\0",
    b"\x80" + b"\0" * 3 + b"\xff" * 8,
    b"\xff" * 12,
    b"\xff" * 10 + b"\xfc\0",
    b"00000000000\0",
    b"garbage!",
    b"",
]


class Decoding(SampleEncoder):
    """Decodes the image, small ones only; all else is the toy encoder's."""

    def __init__(self, encode: SampleEncoder) -> None:
        self.encode = encode

    @property
    def pad_id(self) -> int:
        return self.encode.pad_id

    def texts(self, record: Record, epoch: int) -> list[EncodedText]:
        return self.encode.texts(record, epoch)

    def sample(self, record: Record, epoch: int, texts: list[EncodedText]) -> EncodedSample:
        decode_image(record.image, max_pixels=2**22)
        return self.encode.sample(replace(record, image=b"img"), epoch, texts)


@pytest.fixture
def good(tmp_path: Path, write_tar: Callable[..., None]) -> bytes:
    """A shard with all three image formats, and texts in JSON and plain."""
    members = {}
    for i in range(RECORDS):
        image = io.BytesIO()
        kind = ("jpeg", "png", "webp")[i % 3]
        Image.effect_noise((24, 16 + i), 60).convert("RGB").save(image, kind)
        members[f"k{i:03d}.{kind}"] = image.getvalue()
        members |= {f"k{i:03d}.json": b'{"captions": ["a dog %d"]}' % i} if i % 2 else {f"k{i:03d}.txt": b"a cat"}
    write_tar(tmp_path / "good.tar", members)
    return (tmp_path / "good.tar").read_bytes()


@pytest.fixture
def limits() -> Iterator[None]:
    """Thirty seconds for a single shard (`signal.alarm` is set anew for each), a third of a gigabyte more for all."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before, earlier = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, earlier)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 330_000  # KiB


def mutate(shard: bytes, draw: random.Random) -> bytes:
    """One to three kinds of damage."""
    data = bytearray(shard)
    for _ in range(draw.choice([1, 1, 2, 3])):
        at, length = draw.randrange(len(data)), draw.choice([1, 7, 512, 3000])
        kind = draw.randrange(7)
        if kind == 0:
            for _ in range(draw.choice([1, 5, 100])):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[max(at, 1) :]
        elif kind == 2:
            del data[at : min(at + length, at + len(data) - 1)]
        elif kind == 3:
            data[at:at] = data[draw.randrange(len(data)) :][:length]
        elif kind == 4:
            data[at : at + length] = draw.randbytes(length)
        else:
            _forge(data, draw)
    return bytes(data)


def _forge(data: bytearray, draw: random.Random) -> None:
    """Changes one field of a header and mends its checksum, so that it is believed."""
    headers = [i for i in range(0, len(data) - 511, 512) if data[i + 257 : i + 262] == b"ustar"]
    if not headers:
        return
    at = draw.choice(headers)
    field, size, values = draw.choice(
        [(0, 100, NAMES), (124, 12, SIZES), (156, 1, [bytes([t]) for t in TYPES]), (157, 100, NAMES)]
    )
    data[at + field : at + field + size] = draw.choice(values).ljust(size, b"\0")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def check(shard: bytes, path: Path, encode: SampleEncoder) -> int:
    """Trains an epoch on a shard and reads it record by record; how many records were bad, or all of them."""
    signal.alarm(30)
    path.write_bytes(shard)
    shards = ShardSet(str(path.parent), "toy", (ShardInfo(path.name, RECORDS, len(shard)),))
    reader, bad = ShardReader(), 0
    for number in range(RECORDS):
        try:
            reader.read(path, "toy", number)
        except BadRecord:
            bad += 1
    reader.close()
    loader = Loader([shards], Decoding(encode), 4, streams=2, shuffle_block=3, max_bad_fraction=1.0)
    batches, stopped = [], ""
    try:
        batches += loader.iterate(0)
    except UserError as error:
        stopped = str(error)
    if stopped:
        assert "none can be used" in stopped
        return RECORDS
    assert [b.images.shape for b in batches] == [(4, 3, 4, 4)] * (RECORDS // 4)
    weights = [w for b in batches for w in b.texts.weight.tolist()]
    assert weights.count(0.0) == loader.bad.total() == sum(sum(b.filled.values()) for b in batches) >= bad
    return loader.bad.total()


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_mutations(
    good: bytes, encode: SampleEncoder, limits: None, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert check(good, inside / "shard.tar", encode) == 0
    before = sorted(tmp_path.rglob("*"))
    found = [check(mutate(good, random.Random(seed)), inside / "shard.tar", encode) for seed in range(count)]
    assert sorted(tmp_path.rglob("*")) == before
    assert not os.path.exists("/tmp/evil.jpg")
    # the damage is real, and most of a shard survives most of it
    assert 0.05 < sum(found) / (RECORDS * count) < 0.7
    assert sum(bad == RECORDS for bad in found) < count / 3


def test_names_that_lead_elsewhere_and_links_write_and_read_nothing(limits: None, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret caption")
    path = tmp_path / "a" / "b" / "shard.tar"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for name, data in [
            ("../../evil.jpg", b"img"),
            ("../../evil.txt", b"one"),
            (f"{tmp_path}/evil.jpg", b"img"),
            (f"{tmp_path}/evil.txt", b"two"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in [("k.txt", tarfile.SYMTYPE), ("k.json", tarfile.LNKTYPE), ("k.png", tarfile.FIFOTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        info = tarfile.TarInfo("k.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"img"))
    before = sorted(tmp_path.rglob("*"))
    reader = ShardReader()
    assert [reader.read(path, "toy", i).captions for i in range(2)] == [["one"], ["two"]]
    with pytest.raises(BadRecord, match="neither a caption nor a question"):
        reader.read(path, "toy", 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_negative_size_does_not_lead_back(limits: None, tmp_path: Path) -> None:
    """A header that follows itself would be read for ever."""

    def member(name: str, size: int, data: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[124:136] = b"%011o\0" % size if size >= 0 else (256**12 + size).to_bytes(12, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + data

    path = tmp_path / "shard.tar"
    path.write_bytes(member("a.jpg", 512, b"x" * 512) + member("b.jpg", -512, b"") + member("c.jpg", 512, b"x" * 512))
    signal.alarm(10)
    offsets, damage = scan_shard(path)
    assert (list(offsets), damage) == ([0], "invalid header at byte 1024")


def test_what_claims_or_holds_too_much_is_not_held_in_memory(limits: None, tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    sparse = tarfile.TarInfo("s.jpg")
    sparse.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "s.jpg",
        "GNU.sparse.realsize": str(2**40),
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, size in [
            ("a.jpg", 3),
            ("a.txt", 2**25),
            ("b.jpg", 2**29),
            ("b.txt", 3),
            ("s.jpg", 512),
            ("s.txt", 3),
            ("c.jpg", 3),
            ("c.txt", 3),
        ]:
            info = sparse if name == "s.jpg" else tarfile.TarInfo(name)
            info.size = size
            tar.fileobj.write(info.tobuf())  # type: ignore[union-attr]
            if name == "s.jpg":
                tar.fileobj.write(b"1\n0\n1099511627776\n".ljust(512, b"\0"))  # type: ignore[union-attr]
            elif size < 512:
                tar.fileobj.write(b"abc".ljust(512, b"\0"))  # type: ignore[union-attr]
            else:
                tar.fileobj.seek(size, os.SEEK_CUR)  # type: ignore[union-attr]
            tar.offset = tar.fileobj.tell()  # type: ignore[union-attr]
    reader, causes = ShardReader(), []
    for number in range(3):
        with pytest.raises(BadRecord) as caught:
            reader.read(path, "toy", number)
        causes.append(caught.value.cause)
    assert causes == ["too large", "too large", "no image"]
    assert reader.read(path, "toy", 3).captions == ["abc"]


def test_images_that_are_none(
    good: bytes, encode: SampleEncoder, limits: None, tmp_path: Path, write_tar: Callable[..., None]
) -> None:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(whole, "jpeg")
    png = io.BytesIO()
    Image.new("1", (8, 8)).save(png, "png")
    size = struct.pack(">II", 60_000, 60_000)
    header = b"IHDR" + size + png.getvalue()[24:29]
    bomb = png.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + png.getvalue()[33:]
    images = {
        "wrong_extension": png.getvalue(),
        "cut": whole.getvalue()[:600],
        "broken": whole.getvalue()[:200] + b"\0" * 3000,
        "bomb": bomb,
        "text": b"<html>404</html>",
    }
    members = {
        f"{name}.{kind}": data for name, image in images.items() for kind, data in (("jpg", image), ("txt", b"a"))
    }
    write_tar(tmp_path / "s" / "0.tar", members)
    loader = Loader([load_index(tmp_path / "s")], Decoding(encode), 5, streams=1, max_bad_fraction=1.0)
    (batch,) = loader.iterate(0)
    assert batch.keys == ["wrong_extension"] * 5
    assert batch.filled == {"undecodable image": 4}


def test_shards_of_no_bytes(
    good: bytes, encode: SampleEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "0.tar").touch()
    (folder / "1.tar").write_bytes(good)
    (folder / "2.tar").touch()
    found = load_index(folder)
    assert [s.samples for s in found.shards] == [0, RECORDS, 0]
    assert "0.tar is damaged" in caplog.text
    loader = Loader([found], Decoding(encode), 4, streams=2)
    assert sorted(key for batch in loader.iterate(0) for key in batch.keys) == [f"k{i:03d}" for i in range(RECORDS)]
    # one that lost its bytes after it was counted
    lost = replace(found, shards=(ShardInfo("0.tar", 4, 9), *found.shards[1:]))
    loader = Loader([lost], Decoding(encode), 4, streams=2, max_bad_fraction=0.5)
    assert len(list(loader.iterate(0))) == 4
    assert loader.bad == {"missing": 4}
    os.mkfifo(folder / "3.tar")
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match=r"3.tar is no file"):
        load_index(folder)
