"""Headers of tar files, read quickly where they are plain: tarfile takes longer over them than a record's text takes to tokenize.

What is not plain in every field (long names, pax, sparse files, damage) is tarfile's to read, so both ways find the same.
"""

import re
import tarfile

BLOCK = 512
_PLAIN = re.compile(  # all after the name: of a regular file, whose name needs no more room and whose numbers are octal
    rb"(?:[0-7]{7}[\0 ]){3}"  # mode, owner, group
    rb"([0-7]{11})[\0 ]"  # size
    rb"[0-7]{11}[\0 ]"  # time
    rb"([0-7]{6})\0 0\0{100}"  # checksum, type, no link
    rb"ustar(?:\x0000|  \0).{64}"  # POSIX or GNU; names of owner and group
    rb"(?:[0-7]{7}\0|\0{8}){2}\0.{166}",  # device, no prefix
    re.DOTALL,
)


def plain_header(block: bytes) -> tuple[str, int] | None:
    """Name and size of the file that a header of BLOCK bytes announces; None where tarfile has to read it."""
    found = _PLAIN.fullmatch(block, 100)
    if found is None or sum(block) - sum(block[148:156]) + 8 * ord(" ") != int(found[2], 8):
        return None
    name = block[:100].partition(b"\0")[0].decode(tarfile.ENCODING, "surrogateescape")
    return name, int(found[1], 8)


def plain_members(data: bytes) -> list[tuple[str, int, int]] | None:
    """Name, start and size of the files in a part of a tar; None where tarfile has to read it."""
    found, at = [], 0
    while at < len(data):
        header = plain_header(data[at : at + BLOCK])
        if header is None:
            return None
        name, size = header
        found.append((name, at + BLOCK, size))
        at += BLOCK + -(-size // BLOCK) * BLOCK
    return found if at == len(data) else None


class Member(tarfile.TarInfo):
    """A file in a tar, for `tarfile.open`: of a plain one only name, size and place are known."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Member":
        """As tarfile's."""
        header = plain_header(bytes(buf))
        if header is None:
            return super().frombuf(buf, encoding, errors)
        member = cls(header[0])
        member.size = header[1]
        return member
