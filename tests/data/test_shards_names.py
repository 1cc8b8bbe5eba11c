"""Names of tar members that are not UTF-8, as GNU tar stores `caf\\xe9.jpg` of an old disk, keep their bytes on every way."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.cli import main
from vlm.data.index import load_index
from vlm.data.records import Record
from vlm.data.scan import scan
from vlm.data.shards import ShardWriter
from vlm.errors import BadImage, UserError

KEYS = [b"caf\xe9".decode(errors="surrogateescape"), b"d/caf\xe9".decode(errors="surrogateescape"), "café"]
COMMANDS = {"filter": ["filter"], "join": ["join"], "ask": ["ask", "--per-image", "1"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "JPEG")
    files = {"jpg": buffer.getvalue(), "txt": b"a man in a red shirt rides a horse"}
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key in KEYS:
            for extension, data in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return tmp_path / "in"


def fields_of(folder: Path) -> list[dict[str, Any]]:
    """The JSON of all records as it stands in the tars."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [tar.extractfile(m) for m in tar if m.name.endswith(".json")]
            found += [json.loads(m.read().decode()) for m in members if m is not None]
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_write_the_names_as_they_were(folder: Path, command: str) -> None:
    out = folder.parent / "out"
    assert main(["shards", *COMMANDS[command], str(folder), "--out", str(out)]) == 0
    fields = fields_of(out)
    assert [f["image_id"] for f in fields] == KEYS
    if command == "ask":
        assert [f["questions"][0]["question_id"].rsplit("/", 1)[0] for f in fields] == KEYS


@pytest.mark.parametrize("command", COMMANDS)
def test_and_they_are_read_as_the_same_images(folder: Path, command: str) -> None:
    out = folder.parent / "out"
    assert main(["shards", *COMMANDS[command], str(folder), "--out", str(out)]) == 0

    def known(record: Record) -> tuple[str, int, str | int, list[str]]:
        return record.source, record.image_id, record.name, record.captions

    after = list(scan([load_index(out)]))
    assert [known(record) for record in after] == [known(record) for record in scan([load_index(folder)])]
    assert [record.key for record in after] == [key.replace("/", "_") for key in KEYS]


def test_what_is_utf_8_is_written_as_it_is(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", "toy") as writer:
        writer.write("a", b"img", captions=["eine Straße 道 \U0001f600"], image_id=KEYS[2])
    data = (tmp_path / "s/shard-000000.tar").read_bytes()
    assert "eine Straße 道 \U0001f600".encode() in data
    assert KEYS[2].encode() in data


def test_check_names_them_on_any_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr("vlm.data.check.decode_image", _broken)
    assert main(["shards", "check", str(folder)]) == 1
    assert b"in/caf\\udce9 is broken" in capsysbinary.readouterr().out


def _broken(image: bytes, name: str) -> None:
    raise BadImage(f"{name} is broken")


def test_half_a_character_in_a_text_is_not_written(tmp_path: Path) -> None:
    """Nobody could read the record."""
    asked = [{"question_id": 1, "question": "what \udce9?", "answers": ["red"]}]
    with ShardWriter(tmp_path / "shards", "mine") as writer:
        writer.write("good", b"img", captions=["a dog"], image_id="caf\udce9")
        with pytest.raises(UserError, match="a: its texts hold half a character"):
            writer.write("a", b"img", captions=["a dog \ud83d runs"])
        with pytest.raises(UserError, match="b: its texts hold half a character"):
            writer.write("b", b"img", questions=asked)
    assert load_index(tmp_path / "shards").samples == 1
