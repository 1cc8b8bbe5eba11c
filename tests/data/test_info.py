"""What `vlm shards info` counts and `vlm shards check` finds."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.cli import main
from vlm.data.check import check
from vlm.data.index import ShardSet, load_index
from vlm.data.info import info, spread
from vlm.data.shards import ShardWriter


def encoded(width: int, height: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 80).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Six good records in three shards."""
    with ShardWriter(tmp_path / "in", "photos", 2) as writer:
        for i in range(6):
            captions = ["a dog.", "two dogs run ! on the beach"][:i]
            questions = (
                [{"question_id": i, "question": "what?", "answers": ["dog", "dog", "<cat>"]}] if i % 2 == 0 else []
            )
            image = encoded(40 + i, 60, "PNG" if i == 5 else "JPEG")
            writer.write(f"k{i}", image, "png" if i == 5 else "jpg", captions, questions, i)
    return load_index(tmp_path / "in")


def damage(folder: Path) -> None:
    """Six records more, five of them bad, in a shard of somebody else."""
    good, cut = encoded(50, 50), encoded(90, 90)[:-900]
    members = {
        "a.jpg": cut, "a.txt": b"a cut image",
        "b.jpg": b"<html>", "b.txt": b"no image at all",
        "c.jpg": good, "c.txt": b"caf\xe9",
        "d.jpg": good, "d.json": b"{",
        "e.txt": b"a caption alone",
        "f.jpg": good, "f.txt": b"a good one",
    }  # fmt: skip
    with tarfile.open(folder / "other.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (folder / "index.json").unlink()


def test_counts_sizes_and_texts(shards: ShardSet) -> None:
    found = info(shards)
    assert (found.shards, found.records, found.captions, found.questions, found.bad) == (3, 6, 9, 3, {})
    assert found.bytes == sum(path.stat().st_size for path in Path(shards.root).glob("*.tar"))
    assert found.formats == {"JPEG": 5, "PNG": 1}
    assert (found.spreads["shorter_side"].min, found.spreads["shorter_side"].max) == (40, 45)
    assert found.spreads["longer_side"].mean == 60
    assert (found.spreads["words"].min, found.spreads["words"].max) == (2, 6)
    assert (found.spreads["captions"].min, found.spreads["captions"].median, found.spreads["captions"].max) == (0, 2, 2)
    assert (found.commonest_answers, found.distinct_answers) == ([("dog", 6), ("<cat>", 3)], 2)


@pytest.mark.parametrize("size", [1, 2, 7, 100, 1001])
def test_quantiles_are_numpy_s(size: int) -> None:
    from collections import Counter

    values = np.random.default_rng(size).integers(0, 50, size)
    found = spread(Counter(values.tolist()))
    quantiles = np.quantile(values, [0, 0.05, 0.5, 0.95, 1], method="lower")
    assert [found.min, found.p5, found.median, found.p95, found.max] == quantiles.tolist()
    assert found.mean == pytest.approx(values.mean())


def test_bad_ones_by_cause(shards: ShardSet) -> None:
    damage(Path(shards.root))
    found = info(load_index(shards.root))
    assert found.bad == {"not UTF-8": 1, "broken json": 1, "no image": 1}
    assert found.formats == {"JPEG": 7, "PNG": 1, "unreadable": 1}
    faults = check(load_index(shards.root))
    assert faults.counts == {"undecodable image": 2, "not UTF-8": 1, "broken json": 1, "no image": 1}
    assert faults.examples["undecodable image"][0].startswith(
        "record 0 of other.tar: photos/a:".replace("photos", "in")
    )
    assert faults.records == 12


def test_shards_that_are_not_what_the_index_says(shards: ShardSet) -> None:
    root = Path(shards.root)
    (root / "shard-000000.tar").write_bytes((root / "shard-000001.tar").read_bytes()[:-4000])
    one = (root / "shard-000002.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(one)) as tar:
        third = tar.getmembers()[2].offset
    (root / "shard-000002.tar").write_bytes(one[:third] + bytes(10240))
    assert check(shards).counts == {"damaged shard": 1, "not as the index says": 1, "missing": 2}


def test_the_commands(shards: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "info", shards.root, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["spreads"]["captions"]["max"] == 2
    assert "6/6" in said.err, "progress goes to stderr"
    assert main(["shards", "info", shards.root]) == 0
    assert "commonest of 2 answers: 'dog' 6, '<cat>' 3" in capsys.readouterr().out
    assert main(["shards", "check", shards.root]) == 0
    assert capsys.readouterr().out == f"{shards.root}: 6 records, all of them usable\n"
    damage(Path(shards.root))
    assert main(["shards", "check", shards.root]) == 1
    assert "2  undecodable image\n" in capsys.readouterr().out
