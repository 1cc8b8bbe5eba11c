"""What the source of shards is: as an index says, else made of the folder's name; and no two sets get one by guessing alike."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vlm.cli import main
from vlm.data.index import list_shards, load_index, write_index
from vlm.data.join import join
from vlm.data.places import check_sources, guess_source
from vlm.data.shards import ShardWriter
from vlm.errors import ConfigError, UserError

WriteTar = Callable[..., None]


def foreign(folder: Path, write_tar: WriteTar, caption: str = "a dog") -> Path:
    """Two records as img2dataset writes them, numbered from 0."""
    members = {f"{i:09d}.{e}": d for i in range(2) for e, d in (("jpg", b"img"), ("txt", caption.encode()))}
    write_tar(folder / "00000.tar", members)
    return folder


def ours(folder: Path, source: str) -> Path:
    with ShardWriter(folder, source, 1) as writer:
        for i in range(2):
            writer.write(f"k{i}", b"img", captions=["a dog"], image_id=i)
    return folder


def content(folder: Path) -> dict[str, object]:
    read: dict[str, object] = json.loads((folder / "index.json").read_text())
    return read


@pytest.mark.parametrize(
    ("root", "source"),
    [
        ("/a/cc12m", "cc12m"),
        ("/a/cc12m/train", "cc12m-train"),
        ("/elsewhere/b/cc12m/Train/", "cc12m-Train"),
        ("/a/coco/val2014", "coco-val2014"),
        ("/a/vqa/test-dev2015", "vqa-test-dev2015"),
        ("/a/coco/restval", "coco-restval"),
        ("/a/cc12m/train/val", "cc12m-train-val"),
        ("/a/trains", "trains"),
        ("/train", "train"),
        ("/", ""),
        ("https://host/cc12m/train", "cc12m-train"),
        ("https://huggingface.co/datasets/pixparse/cc3m-wds/resolve/main", "cc3m-wds-resolve-main"),
        ("https://host/cc12m/{shard}?token=T", "cc12m"),
        ("s3://train", "train"),
        ("pipe:aws s3 cp s3://bucket/cc12m/train/{shard} -", "cc12m-train"),
        ("pipe:cat train/{shard}", "train"),
        ("pipe:cat ../train/{shard}", "train"),
    ],
)
def test_a_split_s_folder_takes_the_name_above_it(root: str, source: str) -> None:
    assert guess_source(root) == source


def test_splits_of_two_data_sets_are_two_sources(tmp_path: Path, write_tar: WriteTar) -> None:
    first, second = (foreign(tmp_path / name / "train", write_tar) for name in ("cc12m", "laion"))
    for _ in range(2):  # counted, and from the index made then
        sets = [load_index(first), load_index(second)]
        assert [(s.source, s.guessed) for s in sets] == [("cc12m-train", True), ("laion-train", True)]
        check_sources(sets)
    pattern = f"pipe:cat {first}/{{00000..00000}}.tar"
    assert list_shards(pattern).source == load_index(f"file://{first}/00000.tar").source == "cc12m-train"
    assert list_shards(pattern).guessed


@pytest.fixture
def alike(tmp_path: Path, write_tar: WriteTar) -> list[Path]:
    """Two folders of different photographs, of one name."""
    return [foreign(tmp_path / disk / "web/train", write_tar, disk) for disk in ("a", "b")]


def test_two_places_are_not_guessed_alike(alike: list[Path], tmp_path: Path) -> None:
    message = rf"{alike[0]} and {alike[1]}: .*both would be 'web-train'.*`vlm shards index FOLDER --source NAME`"
    sets = [load_index(folder) for folder in alike]
    with pytest.raises(ConfigError, match=message):
        check_sources(sets)
    with pytest.raises(ConfigError, match=message):
        join(sets, tmp_path / "out")
    uncounted = [list_shards(f"https://{host}/web/train/{{00000..00009}}.tar") for host in ("one", "two")]
    check_sources(uncounted)  # nobody could name these
    remote = [replace(shards, counted=True) for shards in uncounted]
    with pytest.raises(ConfigError, match="https://one/web/train and https://two/web/train"):
        check_sources(remote)


def test_a_shard_that_grew_after_it_was_counted_is_told(
    tmp_path: Path, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    folder = foreign(tmp_path / "web/train", write_tar)
    load_index(folder)
    assert caplog.text == ""
    members = {f"{i:09}.{kind}": b"x" * 600 for i in range(9) for kind in ("jpg", "txt")}
    write_tar(folder / "00000.tar", members)
    load_index(folder)
    assert "00000.tar (1 such) has another size than its index.json says" in caplog.text


def test_the_same_place_twice_and_named_sources_are_read(alike: list[Path], tmp_path: Path) -> None:
    first, second = alike
    (tmp_path / "link").symlink_to(first)
    check_sources([load_index(first), load_index(first / "00000.tar"), load_index(tmp_path / "link")])
    check_sources(
        [list_shards("https://one/web/{00000..00004}.tar"), list_shards("https://one/web/{00005..00009}.tar")]
    )
    write_index(second, "web-train")  # said, not guessed
    check_sources([load_index(first), load_index(second)])
    assert join([load_index(first), load_index(second)], tmp_path / "joined").images == 2
    own = [load_index(ours(tmp_path / f"own/{split}", "mine")) for split in ("train", "val")]
    check_sources([*own, replace(own[0], root="elsewhere")])


def test_an_index_of_an_earlier_release_is_taken_as_guessed_where_it_has_the_folder_s_name(
    alike: list[Path], tmp_path: Path
) -> None:
    for folder in alike:
        write_index(folder)
        old = {key: value for key, value in content(folder).items() if key != "source_guessed"}
        (folder / "index.json").write_text(json.dumps({**old, "source": "train"}))
    sets = [load_index(folder) for folder in alike]
    assert [(s.source, s.guessed) for s in sets] == [("train", True)] * 2, "the identities stay"
    with pytest.raises(ConfigError, match="both would be 'train'"):
        check_sources(sets)
    (alike[0] / "index.json").write_text(json.dumps({**content(alike[0]), "source": "named"}))
    assert not load_index(alike[0]).guessed
    assert not load_index(ours(tmp_path / "photos", "photos")).guessed


def test_counting_anew_keeps_source_and_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ours(tmp_path / "coco/train", "coco")
    before = load_index(folder)
    assert main(["shards", "index", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: 2 shards, 2 records, source coco\n"
    assert load_index(folder) == before
    assert content(folder)["made_by"] == "vlm ShardWriter"
    (folder / "shard-000001.tar").unlink()
    assert write_index(folder).samples == 1
    ours(folder, "coco")  # may still be written again
    assert load_index(folder).samples == 2


def test_what_others_added_is_not_taken_for_ours(tmp_path: Path, write_tar: WriteTar) -> None:
    folder = ours(tmp_path / "coco", "coco")
    write_tar(folder / "more.tar", {"m.jpg": b"img", "m.txt": b"a dog"})
    found = write_index(folder)
    assert (found.source, found.samples, found.guessed) == ("coco", 3, False)
    assert "made_by" not in content(folder)
    with pytest.raises(UserError, match="ShardWriter did not write"):
        ours(folder, "coco")


def test_a_change_of_the_source_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = ours(tmp_path / "photos", "coco")
    write_index(folder, "coco")
    assert not caplog.text
    assert main(["shards", "index", str(folder), "--source", "mine"]) == 0
    assert "its source was coco and is mine now" in caplog.text
    assert content(folder)["made_by"] == "vlm ShardWriter"
    for name in ("", "a/b"):
        with pytest.raises(UserError, match="expected a name without '/'"):
            write_index(folder, name)
    assert load_index(folder).source == "mine"


def test_an_index_lists_the_shards_in_order_whatever_pattern_came_first(tmp_path: Path, write_tar: WriteTar) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"web/{name}.tar", {"m.jpg": b"img", "m.txt": b"a dog"})
    assert [s.name for s in load_index(tmp_path / "web/{b,a}.tar").shards] == ["b.tar", "a.tar"]
    assert [s.name for s in load_index(tmp_path / "web").shards] == ["a.tar", "b.tar"]


def test_an_unusable_index_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = ours(tmp_path / "coco/train", "coco")
    (folder / "index.json").write_text("{")
    found = write_index(folder)
    assert (found.source, found.guessed) == ("coco-train", True)
    assert not caplog.text


def test_where_nothing_can_be_written_the_command_fails_and_reading_goes_on(
    tmp_path: Path,
    write_tar: WriteTar,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = foreign(tmp_path / "web", write_tar)

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("vlm.files.os.replace", read_only)
    assert main(["shards", "index", str(folder)]) == 1
    told = capsys.readouterr()
    assert not told.out
    assert "index.json: cannot be written (Read-only file system)" in told.err
    assert load_index(folder).samples == 2
    assert "The shards will be counted again next time." in caplog.text
    assert not (folder / "index.json").exists()


@pytest.mark.parametrize(
    "place",
    [
        "d/{00000..00331.tar",
        "d/00000..00331}.tar",
        "https://host/{00000..00331.tar",
        "https://host/{00000..00331}}.tar?token=T",
        "pipe:cat d/{00000..00331.tar",
    ],
)
def test_braces_that_do_not_pair_show_the_right_form(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "info", place]) == 2
    assert "a brace lacks its other half; expected the form {00000..00331}.tar." in capsys.readouterr().err
    with pytest.raises(ConfigError, match="other half"):
        list_shards(place)
