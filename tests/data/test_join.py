"""Joined shards: each image once, with all that any of its records says, and nothing lost."""

from pathlib import Path

import pytest

from vlm.cli import main
from vlm.data.index import load_index
from vlm.data.join import join
from vlm.data.scan import scan
from vlm.data.shards import ShardWriter
from vlm.errors import ConfigError


def write(folder: Path, source: str, records: dict[str, tuple[int, list[str], list[str]]]) -> Path:
    """records: key -> image id, captions, questions. The image's bytes name the folder that they come from."""
    with ShardWriter(folder, source, samples_per_shard=2) as writer:
        for key, (image_id, captions, questions) in records.items():
            asked = [{"question_id": i, "question": q, "answers": ["yes"]} for i, q in enumerate(questions)]
            writer.write(key, f"{folder.name} {key}".encode(), "jpg", captions, asked, image_id)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    captions = write(
        tmp_path / "captions", "coco", {"a": (1, ["one"], []), "b": (2, ["two", "zwei"], []), "c": (3, ["three"], [])}
    )
    questions = write(
        tmp_path / "questions",
        "coco",
        {"q2": (2, ["two", "deux"], ["two?", "2?"]), "c": (4, [], ["four?"]), "a": (1, [], ["one?"])},
    )
    return [captions, questions]


def test_each_image_once_with_all_its_texts(folders: list[Path], tmp_path: Path) -> None:
    done = join([load_index(folder) for folder in folders], tmp_path / "joined")
    assert (done.records, done.images, done.shared) == (6, 4, 2)
    found = {r.name: r for r in scan([load_index(tmp_path / "joined")])}
    assert list(found) == [1, 2, 3, 4]
    assert [found[i].captions for i in found] == [["one"], ["two", "zwei", "deux"], ["three"], []]
    assert [[q["question"] for q in found[i].questions] for i in found] == [["one?"], ["two?", "2?"], [], ["four?"]]
    assert found[1].image == b"captions a"
    assert [found[i].key for i in found] == ["a", "b", "c", "c_2"]
    before = {r.image_id for folder in folders for r in scan([load_index(folder)])}
    assert {r.image_id for r in found.values()} == before


def test_one_folder_stays_as_it_is(folders: list[Path], tmp_path: Path) -> None:
    join([load_index(folders[0])], tmp_path / "joined")
    assert list(scan([load_index(folders[0])])) == list(scan([load_index(tmp_path / "joined")]))


def test_different_sources_share_nothing(folders: list[Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other", "flickr8k", {"a": (1, ["one"], [])})
    with pytest.raises(ConfigError, match=r"coco, flickr8k.*data\.splits\.train"):
        join([load_index(folders[0]), load_index(other)], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_the_command(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "join", *map(str, folders), "--out", str(tmp_path / "joined")]) == 0
    assert "4 images of 6 records, 2 of them in several" in capsys.readouterr().out
