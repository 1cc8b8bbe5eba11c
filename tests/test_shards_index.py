"""`vlm shards index`: counts a folder of shards anew."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.cli import main
from vlm.data.index import load_index
from vlm.data.scan import scan
from vlm.data.shards import ShardWriter


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Seven records in three shards, without index.json."""
    folder = tmp_path / "mine"
    with ShardWriter(folder, "photos", 3) as writer:
        for number in range(7):
            writer.write(f"k{number}", b"img%d" % number, captions=[f"caption {number}"], image_id=number)
    (folder / "index.json").unlink()
    return folder


def test_counts_records_and_bytes(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "index", str(shards), "--source", "photos"]) == 0
    assert capsys.readouterr().out == f"{shards}: 3 shards, 7 records, source photos\n"
    index = json.loads((shards / "index.json").read_text())
    assert (index["source"], index["samples"]) == ("photos", 7)
    assert [s["samples"] for s in index["shards"]] == [3, 3, 1]
    assert [s["bytes"] for s in index["shards"]] == [(shards / s["name"]).stat().st_size for s in index["shards"]]
    assert [record.key for record in scan([load_index(shards)])] == [f"k{number}" for number in range(7)]


def test_an_index_that_no_longer_fits_is_made_anew(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "index", str(shards)]) == 0
    (shards / "shard-000002.tar").unlink()
    assert main(["shards", "index", str(shards)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{shards}: 2 shards, 6 records, source mine"
    assert load_index(shards).samples == 6


def test_a_shard_cut_short_counts_its_whole_records(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut = shards / "shard-000000.tar"
    cut.write_bytes(cut.read_bytes()[:3500])
    assert main(["shards", "index", str(shards)]) == 0
    assert load_index(shards).samples < 7
    assert "shard-000000.tar is damaged" in caplog.text


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_a_folder_without_shards(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "none")
    assert main(["shards", "index", str(tmp_path / "none")]) == 1
    assert "holds no shards (*.tar)" in capsys.readouterr().err


def test_bad_arguments_exit_2() -> None:
    for arguments in (["shards"], ["shards", "index"], ["shards", "index", "a", "--deep"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
