"""What an index says is what lies there: counted by the headers when it is asked for, of all of a folder, each shard once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.cli import main
from vlm.data.index import list_shards, load_index
from vlm.data.scan import scan
from vlm.errors import ConfigError

WriteTar = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path, write_tar: WriteTar) -> Path:
    """Three tars of four records each."""
    place = tmp_path / "set"
    for tar in range(3):
        members = {}
        for i in range(4 * tar, 4 * tar + 4):
            members |= {f"k{i:03d}.jpg": b"img%d" % i, f"k{i:03d}.txt": b"a caption"}
        write_tar(place / f"{tar:05d}.tar", members)
    return place


@pytest.mark.parametrize("stated", [10, 2])
def test_counting_anew_asks_the_tars(
    folder: Path, stated: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What img2dataset wrote beside a tar serves at the first use alone: nobody changes it with the tar."""
    (folder / "00001_stats.json").write_text(json.dumps({"successes": stated}))
    assert [s.samples for s in load_index(folder).shards] == [4, stated, 4]
    assert main(["shards", "check", str(folder)]) == 1
    assert f"holds 4 records, the index says {stated}; run `vlm shards index" in capsys.readouterr().out
    assert main(["shards", "index", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: 3 shards, 12 records, source set\n"
    assert [s.samples for s in load_index(folder).shards] == [4, 4, 4]
    main(["shards", "check", str(folder)])
    assert "not as the index says" not in capsys.readouterr().out


def test_stated_counts_that_are_none_are_passed_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for tar, text in enumerate(('{"successes": -1}', "[]", "{")):
        (folder / f"{tar:05d}_stats.json").write_text(text)
    assert load_index(folder).samples == 12
    assert caplog.text.count("cannot be used; counting the records") == 3


def test_a_folder_called_like_a_tar_is_a_folder(folder: Path) -> None:
    folder = folder.rename(folder.with_suffix(".tar"))
    for place in (str(folder), f"{folder}/"):
        found = load_index(place)
        assert (found.root, found.samples) == (str(folder), 12)
    assert len(list(scan([load_index(folder / "{00000..00001}.tar")]))) == 8


def test_a_part_of_a_folder_gets_no_index(folder: Path) -> None:
    """It would be taken for that of all of the folder."""
    assert load_index(f"{folder}/{{00000..00001}}.tar").samples == 8
    assert load_index(folder / "00002.tar").samples == 4
    assert not (folder / "index.json").exists()
    assert load_index(f"{folder}/{{00000..00002}}.tar").samples == 12
    assert len(json.loads((folder / "index.json").read_text())["shards"]) == 3


@pytest.mark.parametrize("indexed", [False, True])
def test_a_shard_that_a_pattern_names_twice_is_refused(folder: Path, indexed: bool) -> None:
    if indexed:
        load_index(folder)
    for pattern in ("{00000,00000}.tar", "{00001,{00000..00002}}.tar"):
        with pytest.raises(ConfigError, match=r"names 0000[01]\.tar twice, so its records would be read twice"):
            load_index(folder / pattern)
    for place in ("https://nowhere.invalid/{00000,00000}.tar", "pipe:cat x/{0,0}0000.tar"):
        for read in (load_index, list_shards):
            with pytest.raises(ConfigError, match=r"names 00000\.tar twice"):
                read(place)


def test_nothing_to_check_is_no_good_news(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write_tar: WriteTar
) -> None:
    for name, tars in (("empty", []), ("hollow", ["00000.tar"])):
        (tmp_path / name).mkdir()
        for tar in tars:
            write_tar(tmp_path / name / tar, {})
        shards = [{"name": tar, "samples": 0, "bytes": 0} for tar in tars]
        (tmp_path / name / "index.json").write_text(json.dumps({"source": "toy", "shards": shards, "samples": 0}))
        assert main(["shards", "check", str(tmp_path / name)]) == 1
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith(f"vlm: {tmp_path / name} holds no records, so there is nothing to check;")
