"""benchmarks/loader.py: its contenders read the same photographs whole, their pixels are close, and ratios are taken within a round."""

import io
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm.data.images import decode_image
from vlm.data.shards import ShardSet, load_index
from vlm.data.synthetic import write_scenes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loader() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks/loader.py"))


@pytest.fixture
def source(tmp_path: Path) -> ShardSet:
    write_scenes(tmp_path / "scenes", 8, 1, size=64)
    return load_index(tmp_path / "scenes/train")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_contender_reads_the_photographs(loader: dict[str, Any], source: ShardSet, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    (tmp_path / "photos").mkdir()
    photos = loader["write_photos"](Path(source.root), tmp_path / "photos", 640, 480, 4)
    assert [decode_image(data).size for data in photos] == [(640, 480)] * 4
    assert loader["difference"](photos) < 2
    large = io.BytesIO()
    decode_image(photos[0]).resize((1600, 1200)).save(large, "JPEG")
    assert loader["difference"]([large.getvalue()]) < 2
    found = loader["contenders"](tmp_path / "photos", photos, 2)
    assert list(found) == ["ours", "ours, Pillow alone", "open_clip", "bare loop", "bare loop, Pillow"]
    for name in ("open_clip", "bare loop", "bare loop, Pillow", "ours"):
        assert sum(found[name]()) == 4, name


def test_a_run_is_measured_in_a_process_of_its_own(loader: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> Iterator[int]:
        sys.modules.pop("vlm", None)  # seen by nobody else
        yield from (3, 4)

    results = loader["measure"]({"ours": work, "other": work}, 2)
    assert "vlm" in sys.modules
    assert [[run["samples"] for run in runs] for runs in results.values()] == [[7, 7], [7, 7]]
    pair = [{"wall": 2.0, "cpu": 4.0, "mib": 1.0}, {"wall": 6.0, "cpu": 9.0, "mib": 1.0}]
    slow = [{"wall": 1.0, "cpu": 1.0, "mib": 1.0}, {"wall": 1.0, "cpu": 3.0, "mib": 1.0}]
    loader["show"]({"ours": pair, "slow": slow})
    assert "ours is 3.50 by processor (3.00 to 4.00), 4.00 by clock (2.00 to 6.00)" in capsys.readouterr().out
