"""Headers of tars that are read without tarfile: what is found is what tarfile finds, and all that is not plain is left to it."""

import io
import random
import tarfile

import pytest

from vlm.data.headers import BLOCK, Member, plain_header, plain_members

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def tar_of(form: int, *members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """The tar without its end."""
    file, end = io.BytesIO(), 0
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    return file.getvalue()[:end]


def named(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def by_tarfile(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(m.name, m.offset_data, m.size) for m in tar]


@pytest.mark.parametrize("form", FORMATS)
def test_plain_files_are_found_as_tarfile_finds_them(form: int) -> None:
    owner = {"uname": "anna", "gname": "users", "uid": 1000, "mtime": 1700000000}
    data = tar_of(
        form, (named("a/k1.jpg", **owner), b"x" * 700), (named("k1.json"), b""), (named("k2.txt"), b"y" * 512)
    )
    assert plain_members(data) == by_tarfile(data)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", tarinfo=Member) as tar:
        assert [(m.name, m.offset_data, m.size, m.isreg()) for m in tar] == [(*f, True) for f in by_tarfile(data)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "info",
    [
        named("long/" * 30 + "k.jpg"),
        named("k", type=tarfile.DIRTYPE),
        named("k.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        named("k.jpg", type=tarfile.AREGTYPE),
    ],
    ids=["long name", "folder", "link", "old"],
)
def test_others_are_left_to_tarfile(form: int, info: tarfile.TarInfo) -> None:
    data = tar_of(form, (named("a.txt"), b"y"), (info, b""))
    assert plain_members(data) is None
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", tarinfo=Member) as tar:
        assert [(m.name, m.offset_data, m.size) for m in tar] == by_tarfile(data)


def test_a_part_that_is_cut_is_left_to_tarfile() -> None:
    data = tar_of(tarfile.USTAR_FORMAT, (named("a.txt"), b"y" * 600))
    for end in (len(data) - 1, len(data) - BLOCK, BLOCK, BLOCK - 1):
        assert plain_members(data[:end]) is None
    assert plain_members(data + bytes(BLOCK)) is None


def test_a_damaged_header_is_read_only_as_tarfile_reads_it() -> None:
    """Bytes of a header are changed, half the time with a checksum that fits again."""
    draw, accepted = random.Random(0), 0
    good = tar_of(tarfile.GNU_FORMAT, (named("k.jpg", uname="anna"), b""))[:BLOCK]
    for _ in range(5000):
        block = bytearray(good)
        block[draw.randrange(BLOCK)] = draw.choice(b"\0 019/-a\x80\xff")
        if draw.random() < 0.5:
            block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
        found = plain_header(bytes(block))
        if found is not None:
            theirs = tarfile.TarInfo.frombuf(bytes(block), tarfile.ENCODING, "surrogateescape")
            assert found == (theirs.name, theirs.size)
            assert theirs.type == tarfile.REGTYPE
            accepted += 1
    assert accepted > 500
