"""benchmarks/shuffle.py: its measures tell a full permutation from an order that is none, and the simulation runs."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shuffle() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks/shuffle.py"))


def test_the_measures_of_the_best_and_the_worst_order(shuffle: dict[str, Any]) -> None:
    count, samples, batch = 100_000, 100, 50
    best = shuffle["quality"](np.random.default_rng(0).permutation(count), samples, batch)
    assert best["distance"] == pytest.approx(1, abs=0.02)
    assert best["same shard"] == pytest.approx((samples - 1) / (count - 1), rel=0.1)
    assert best["spread"] == pytest.approx(1, abs=0.06)
    assert abs(best["correlation"]) < 0.08
    worst = shuffle["quality"](np.arange(count), samples, batch)
    assert worst["distance"] == pytest.approx(3 / count)
    assert worst["same shard"] == 1
    assert worst["correlation"] == pytest.approx(1)


def test_an_epoch_is_shuffled_like_a_permutation_but_for_the_shards_that_are_read_together(
    shuffle: dict[str, Any],
) -> None:
    """Neighbours are as far apart as in a full permutation; a batch is of as many shards at most as there are streams."""
    few, many = (shuffle["our_order"](200, 100, streams, 100) for streams in (16, 160))
    assert sorted(few) == sorted(many) == list(range(20_000))
    measured = [shuffle["quality"](order, 100, 32) for order in (few, many)]
    assert all(found["distance"] == pytest.approx(1, abs=0.1) for found in measured)
    assert measured[0]["same shard"] < 1.3 / 16
    assert measured[1]["same shard"] < 1.3 / 160
    assert measured[1]["spread"] < measured[0]["spread"] < 2


def test_it_reports_both_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shuffle: dict[str, Any]
) -> None:
    main = shuffle["main"]
    last = "planned once, resumed by 512 ranks in turn"
    monkeypatch.setitem(main.__globals__, "STEPS", {last: shuffle["STEPS"][last]})  # a process each
    monkeypatch.setattr(sys, "argv", ["shuffle.py", "--shards", "5", "--streams", "4", "--simulated", "2000"])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16] for line in lines[1:4]] == ["S=4, block 1000 ", "full permutation", "order of the fil"]
    assert lines[4] == "2,000 shards x 10,000 records, 512 ranks"
    assert len(lines) == 6
    assert lines[5].startswith(last)
    assert lines[5].endswith(" MiB")
    monkeypatch.setattr(sys, "argv", ["shuffle.py", "--streams", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
