"""Captions for data that are bad in part or all of it: what could not be captioned is told by cause."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vlm.cli import main
from vlm.data.index import ShardSet, load_index
from vlm.data.shards import ShardWriter

Checkpoint = Callable[..., Path]


def write(folder: Path, count: int, bad: int) -> ShardSet:
    """Images of one caption each, the first so many of which are none."""
    with ShardWriter(folder, "toy", 4) as writer:
        for i in range(count):
            data = io.BytesIO()
            Image.effect_noise((32, 32), 50 + i).convert("RGB").save(data, "PNG")
            writer.write(f"k{i}", b"no image" if i < bad else data.getvalue(), "png", [f"caption {i}"], image_id=i)
    return load_index(folder)


def break_text(shards: ShardSet) -> None:
    """The text of the last record is none any more."""
    tar = Path(shards.root) / shards.shards[-1].name
    before, _, after = tar.read_bytes().rpartition(b'{"captions"')
    tar.write_bytes(before + b'["captions"' + after)


@pytest.mark.parametrize("filtering", [[], ["--filter", "0"]])
def test_what_cannot_be_captioned_is_told_by_cause(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], filtering: list[str]
) -> None:
    shards = write(tmp_path / "in", 9, 4)
    break_text(shards)
    out = tmp_path / "out"
    model = str(checkpoint("pretraining"))
    assert main(["shards", "caption", shards.root, "--model", model, "--out", str(out), *filtering]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{out}: 8 images, ")
    assert told.endswith("; 4 images cannot be decoded and got none; unusable records left out: 1 broken json\n")


def test_where_no_image_can_be_used_nothing_is_written(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write(tmp_path / "in", 9, 9)
    break_text(shards)
    command = ["shards", "caption", shards.root, "--model", str(checkpoint("pretraining")), "--out"]
    assert main([*command, str(tmp_path / "out")]) == 1
    assert "can be used (1 broken json, 8 undecodable image), so nothing was written" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "out"), "--filter"]) == 1
    assert "no image that can be decoded has a caption" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    write(tmp_path / "in", 9, 0)  # mended, the same command has nothing to go on with
    assert main([*command, str(tmp_path / "out")]) == 0
