"""benchmarks/objectives.py: the comparison scaled down, what it concludes from made numbers, and the full size (slow)."""

import itertools
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vlm.metrics.interval import bootstrap

SCRIPT = Path(__file__).parents[2] / "benchmarks/objectives.py"
SETS = ("contrastive", "+ matching", "+ masked language")
MEASURES = ("R@1, embeddings", "R@1, re-ranked", "CIDEr")
TINY = ("--seeds", "1", "--encoders", "test_vit", "--train", "64", "--val", "8")
Run = Callable[..., int]


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(*arguments): the script's exit status."""

    def start(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return int(ended.value.code or 0)

    return start


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_scaled_down_and_gone_on_with(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*TINY, "--epochs", "1", "--out", str(tmp_path / "run")]
    assert run(*command) == 0
    told, results = capsys.readouterr(), read(tmp_path / "run/results.json")
    assert [line[:19].strip() for line in told.err.splitlines() if " of 3 left, ETA " in line] == [
        "=== 2 of 3 left, ET",
        "=== 1 of 3 left, ET",
        "=== 0 of 3 left, ET",
    ]
    rows = [(row["encoder"], row["measure"], row["set"]) for row in results["scores"]]
    assert rows == list(itertools.product(["test_vit"], MEASURES, SETS))
    assert [("mean" in row) for row in results["scores"]] == [True] * 3 + [False, True, True] + [True] * 3
    assert all(0 <= row["low"] <= row["mean"] <= row["high"] for row in results["scores"] if "mean" in row)
    assert "| none: no matching head was trained |" in told.out
    check_equal_but_for_the_objectives(tmp_path / "run/test_vit/seed0")

    lost = tmp_path / "run/test_vit/seed0/matching"
    before = read(lost / "result.json")
    shutil.rmtree(lost)
    assert run(*command) == 0
    again = capsys.readouterr()
    started = [line for line in again.err.splitlines() if line.startswith("$ vlm ")]
    assert len(started) == 3, "the two that are there are not run again"
    assert all(str(lost) in line for line in started)
    assert {**read(lost / "result.json"), "seconds": 0} == {**before, "seconds": 0}
    assert again.out == told.out
    assert run(*command) == 0
    assert "$ vlm" not in capsys.readouterr().err

    assert run(*TINY, "--epochs", "2", "--out", str(tmp_path / "run")) == 1
    assert "was made with {'epochs': 1.0, 'set': [], 'train': 64, 'val': 8}, now" in capsys.readouterr().err


def check_equal_but_for_the_objectives(seed: Path) -> None:
    """Settings, steps and the fine-tuning are one and the same, and so are the images that were scored."""
    folders = [seed / name for name in ("contrastive", "matching", "masked_language")]
    for stage in ("pretrain", "captioning"):
        configs = [yaml.safe_load((folder / stage / "config.yaml").read_text()) for folder in folders]
        weights = [config.pop("objectives") for config in configs]
        for config in configs:
            del config["out"], config["init_from"]
        assert configs[0] == configs[1] == configs[2]
        names = ("contrastive", "matching", "masked_language", "captioning")
        wanted = [(1, 0, 0, 0), (1, 1, 0, 0), (1, 1, 1, 0)]
        if stage == "pretrain":
            assert [tuple(weight[name] for name in names) for weight in weights] == wanted
        else:
            assert weights[0] == weights[1] == weights[2]
        logs = [(folder / stage / "log.jsonl").read_text().splitlines() for folder in folders]
        last = [json.loads(log[-1]) for log in logs]
        assert last[0]["step"] == last[1]["step"] == last[2]["step"] > 0
    cells = [read(folder / "result.json") for folder in folders]
    assert cells[0]["images"] == cells[1]["images"] == cells[2]["images"]
    assert all(len(cell[name]) == 8 for cell in cells for name in ("images", "embeddings", "cider"))


def made(embeddings: list[Any], reranked: list[Any], cider: list[Any]) -> dict[Any, Any]:
    """Cells of an encoder: of each set its values (S, N)."""
    cells = {}
    for name, *values in zip(SETS, embeddings, reranked, cider, strict=True):
        for seed in range(len(values[0])):
            keys = ("embeddings", "reranked", "cider")
            cells["net", seed, name] = {k: None if v is None else v[seed] for k, v in zip(keys, values, strict=True)}
    return cells


def test_what_is_concluded_from_made_numbers(benchmark: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(0, 50, (3, 200))  # what all sets share: far above the differences, as in truth
    worse = np.array([[9.0], [10.0], [11.0]])
    torn = np.array([[-10.0], [0.0], [10.0]])  # each seed sure of something else
    cells = made(
        [images, images + 1, images - worse],
        [None, images + 5 + rng.normal(0, 3, (3, 200)), images + 5],
        [2 * images, 2 * images + torn, 2 * images],
    )
    found = benchmark["summarize"](["net"], 3, cells)
    told = {(row["measure"], row["set"]): row for row in found["differences"]}
    assert {key: row["verdict"] for key, row in told.items()} == {
        ("R@1, embeddings", "+ matching"): "rises",
        ("R@1, embeddings", "+ masked language"): "falls",
        ("R@1, re-ranked", "+ matching"): "rises",
        ("R@1, re-ranked", "+ masked language"): "not told apart",
        ("CIDEr", "+ matching"): "not told apart",
        ("CIDEr", "+ masked language"): "not told apart",
    }
    sure = told["R@1, embeddings", "+ matching"]
    assert (sure["mean"], sure["low"], sure["high"]) == pytest.approx((1, 1, 1)), "image by image, not of two means"
    assert told["R@1, re-ranked", "+ matching"]["mean"] == pytest.approx(5, abs=0.5), "beside contrastive's embeddings"
    assert told["CIDEr", "+ matching"]["by_seed"] == pytest.approx([-10, 0, 10])
    lines = list(benchmark["lines"](found))
    assert lines[2].startswith("| net | contrastive |")
    assert lines[2].count("| none: no matching head was trained |") == 1
    assert lines[8] == "| net | + matching | R@1, embeddings | +1.0 (+1.0 to +1.0) | +1.0, +1.0, +1.0 | rises |"


def test_the_interval_is_the_library_s_and_covers_seeds_too() -> None:
    interval = runpy.run_path(str(SCRIPT.with_name("objectives_summary.py")))["interval"]
    values = np.random.default_rng(1).normal(40, 30, (3, 100))
    assert interval(values[:1]) == pytest.approx(bootstrap(values[0].tolist()))
    low, high = interval(np.repeat([[1.0], [2.0], [3.0]], 100, axis=1))
    assert (low, high) == (1, 3), "of three seeds that differ, and images that do not"
    low, high = interval(values)
    assert 20 < low < values.mean() < high < 60


def test_equal_captions_of_single_ones_are_as_right(benchmark: dict[str, Any]) -> None:
    images, texts = benchmark["image_ids"]([[(5, 6)], [(7,)], [(5, 6)]])
    assert (images, texts) == ([0, 1, 0], [0, 1, 0])
    #                  text 0, 1, 2
    scores = np.array([[0.1, 0.0, 0.9], [0.5, 0.4, 0.3], [0.8, 0.3, 0.2]])
    # images 0 and 2 find each other's text, which is their own too; image 1 finds another's, but its text finds it
    assert benchmark["right_first"](scores, images, texts) == [100, 50, 100]
    assert benchmark["right_first"](scores, [0, 1, 2], [0, 1, 2]) == [0, 50, 0]


def test_of_several_captions_each_counts_its_share(benchmark: dict[str, Any]) -> None:
    images, texts = benchmark["image_ids"]([[(5,), (6,)], [(5,), (7,)]])
    assert (images, texts) == ([0, 1], [0, 0, 1, 1])
    scores = np.array([[0.9, 0.1, 0.2, 0.3], [0.1, 0.5, 0.4, 0.1]])
    # image 0 finds its text, one of whose two finds it; image 1 finds a stranger's, and one of its texts finds it
    assert benchmark["right_first"](scores, images, texts) == [75, 25]


def test_what_is_left_takes_as_long_as_the_like_of_it(benchmark: dict[str, Any]) -> None:
    cells = {("net", 0, "contrastive"): {"seconds": 10.0}, ("net", 0, "+ matching"): {"seconds": 30.0}}
    assert benchmark["expected"](cells, "+ matching") == 30
    assert benchmark["expected"](cells, "+ masked language") == 20


def test_photographs_that_are_not_there_are_named(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--photographs", str(tmp_path), "--out", str(tmp_path / "run")) == 1
    assert f"{tmp_path} has no train; datasets/flickr8k/prepare.py makes" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--epochs", "-1"], ["--train", "many"], ["more"]])
def test_bad_arguments_exit_2(run: Run, tmp_path: Path, arguments: list[str]) -> None:
    assert run(*arguments, "--out", str(tmp_path / "run")) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_in_full_size(tmp_path: Path) -> None:
    """What held where it was measured (benchmarks/RESULTS.md). The order by re-ranked R@1 did not, and nothing is asserted of it."""
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path / "run")], check=True)
    results = read(tmp_path / "run/results.json")
    found = {(row["encoder"], row["measure"], row["set"]): row for row in results["scores"]}
    assert len(found) == 2 * len(MEASURES) * len(SETS)
    for name in SETS:  # one of 400 is right by chance
        assert found["test_resnet", "R@1, embeddings", name]["mean"] > 30
        assert found["test_vit", "R@1, embeddings", name]["mean"] > 2
        assert found["test_resnet", "CIDEr", name]["mean"] > 350
