"""Files are written whole or not at all."""

import errno
import json
from pathlib import Path

import pytest

from vlm import files
from vlm.errors import UserError
from vlm.files import replace_text, replacing, write_json


def test_folders_are_made_and_nothing_is_left_beside(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/a.json"
    write_json(path, {"where": "Zürich"})
    write_json(path, {"where": "Genève"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"where": "Genève"}
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_told_in_one_line_and_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match=r"a\.txt: cannot be written \(No space left on device\); free space"):
        replace_text(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_writer_passes_and_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")

    def fail() -> None:
        with replacing(path) as new:
            new.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_names_that_are_not_utf_8_are_read_as_they_were(tmp_path: Path) -> None:
    name = b"caf\xe9 \\".decode(errors="surrogateescape")  # as a folder or a tar gives it
    write_json(tmp_path / "a.json", [{"image_id": name, name: "Zürich"}])
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == [{"image_id": name, name: "Zürich"}]
    replace_text(tmp_path / "a.txt", f"Zürich {name}")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Zürich caf\\udce9 \\"
