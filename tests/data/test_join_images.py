"""Joining shards: images of other bytes are counted, inputs stay, and how far it is goes to stderr."""

from pathlib import Path

import pytest

from vlm.cli import main
from vlm.data.index import load_index
from vlm.data.scan import scan
from vlm.data.shards import ShardWriter


def write(folder: Path, images: dict[int, bytes]) -> Path:
    with ShardWriter(folder, "coco") as writer:
        for image_id, image in images.items():
            writer.write(f"k{image_id}", image, captions=[f"{folder.name} {image_id}"], image_id=image_id)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Of the images 1, 2 and 3, which both have, 2 and 3 were encoded again."""
    first = write(tmp_path / "first", {1: b"one", 2: b"two", 3: b"three"})
    return [first, write(tmp_path / "second", {1: b"one", 2: b"zwei", 3: b"drei", 4: b"vier"})]


def test_images_of_other_bytes_are_counted(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "join", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    counts = "4 images of 7 records, 3 of them in several; 2 of these had other bytes elsewhere, and the first are kept"
    assert told.out == f"{tmp_path}/out: {counts}\n"
    assert [record.image for record in scan([load_index(tmp_path / "out")])] == [b"one", b"two", b"three", b"vier"]
    assert main(["shards", "join", str(folders[0]), str(folders[0]), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: 3 images of 6 records, 3 of them in several\n"


def test_it_shows_how_far_it_is(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "join", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert told.count("reading: 100%") == told.count("writing: 100%") == 2


def test_a_folder_that_is_read_is_not_replaced(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(folders[1])
    before = list(scan([load_index(folder) for folder in folders]))
    for out in (*folders, tmp_path / "link", folders[0] / "../second"):
        assert main(["shards", "join", *map(str, folders), "--out", str(out)]) == 2
        assert "is the folder that is read, and shards are never changed in place" in capsys.readouterr().err
    assert list(scan([load_index(folder) for folder in folders])) == before


def test_shards_of_others_are_refused_before_anything_is_read(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/theirs.tar").write_bytes(b"")
    assert main(["shards", "join", *map(str, folders), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "ShardWriter did not write" in told
    assert "reading" not in told
