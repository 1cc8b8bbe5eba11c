"""benchmarks/retrieval.py: the pairs that it counts are those that are scored, and the projection is arithmetic."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/retrieval.py"


def test_a_small_size_is_measured_and_projected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), "--shape", "tiny", "--images", "4", "--captions", "9", "--k", "1", "9"]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith("| 4 x 9, 1 | ")
    assert lines[5].startswith("| 4 x 9, 9 | 36 | ")
    assert sum(line.startswith("- ") for line in lines) == 5


def test_the_pairs_are_the_candidates() -> None:
    count = runpy.run_path(str(SCRIPT))["count_pairs"]
    from vlm.tasks.reranking import _candidates

    similarity = np.random.default_rng(0).normal(size=(5, 9))
    for k in (1, 3, 9):
        assert count(similarity, k) == _candidates(similarity, k).sum()
