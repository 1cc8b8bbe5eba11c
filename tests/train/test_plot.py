"""Curves from made-up logs: everything that was logged is drawn, what cannot be drawn is said in one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from vlm.cli import main
from vlm.errors import UserError
from vlm.train.plot import SMOOTHED_FROM, loss_names, plot_runs, read_run, score_curves, smoothed, titles


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """write_run(name, losses): a run of 4 log lines with these losses, evaluated twice, with a skipped step."""

    def write(name: str, losses: tuple[str, ...] = ("contrastive", "matching"), score: str = "mean_R@1") -> Path:
        lines: list[dict[str, Any]] = []
        for step in (10, 20, 30, 40):
            single = {f"{loss}/loss": 3.0 - step / 20 for loss in losses}
            rates = {"lr": 1e-3 / step, "samples_per_second": 100.0 + step}
            lines.append({"kind": "train", "step": step, "loss": 5.0 - step / 10, **rates, **single})
        lines.append({"kind": "skipped", "step": 33, "keys": ["a"]})
        for step in (20, 40):
            scores = {"scenes": {score: step / 2, "images": 64.0}, "photos": {score: step / 4}}
            lines.append({"kind": "evaluation", "step": step, "scores": scores})
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
        return folder

    return write


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that are closed meanwhile."""
    closed: list[Figure] = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", closed.append)
    yield closed
    for figure in closed:
        close(figure)


def curves(axis: Any) -> list[tuple[list[float], list[float]]]:
    """The lines of a panel, marks of skipped steps left out."""
    return [(list(l.get_xdata()), list(l.get_ydata())) for l in axis.lines if l.get_marker() != "x"]


def test_runs_of_different_objectives_share_panels_by_loss_and_score(
    write_run: Callable[..., Path], figures: list[Figure]
) -> None:
    one, two = write_run("first/vqa", ("matching",), "accuracy"), write_run("second/pretrain")
    picture = plot_runs([one, two])
    assert picture == one / "curves.png"
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
    panels = {axis.get_title(): axis for axis in figures[0].axes if axis.get_visible()}
    assert list(panels) == [
        "matching loss",
        "contrastive loss",
        "mean_R@1",
        "accuracy",
        "learning rate",
        "samples a second",
    ]
    assert curves(panels["matching loss"]) == [([10, 20, 30, 40], [2.5, 2.0, 1.5, 1.0])] * 2
    assert len(curves(panels["contrastive loss"])) == 1
    assert curves(panels["accuracy"]) == [([20, 40], [10.0, 20.0]), ([20, 40], [5.0, 10.0])]
    assert curves(panels["samples a second"])[0][1] == [110.0, 120.0, 130.0, 140.0]
    colours = [line.get_color() for line in panels["matching loss"].lines if line.get_marker() != "x"]
    assert len(set(colours)) == 2
    assert panels["contrastive loss"].lines[0].get_color() == colours[1] == panels["mean_R@1"].lines[0].get_color()
    assert [line.get_marker() for line in panels["accuracy"].lines] == ["o", "s"]
    crosses = [line for line in panels["contrastive loss"].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[33]]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["vqa", "pretrain", "scenes", "photos", "skipped step"]


def test_a_run_without_evaluations_and_with_gaps(write_run: Callable[..., Path], figures: list[Figure]) -> None:
    run = write_run("a")
    lines = read_run(run).train
    del lines[1]["lr"], lines[2]["matching/loss"]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_runs([run])
    contrastive, matching, rates, speed = (axis for axis in figures[0].axes if axis.get_visible())
    assert [curves(axis)[0][0] for axis in (contrastive, matching)] == [[10, 20, 30, 40], [10, 20, 40]]
    assert curves(rates)[0][0] == [10, 30, 40]
    assert speed.get_title() == "samples a second"


def test_noisy_losses_are_smoothed_and_the_rate_is_not(write_run: Callable[..., Path], figures: list[Figure]) -> None:
    run = write_run("a", ("captioning",))
    noise = np.random.default_rng(0).normal(size=200)
    lines = [{"kind": "train", "step": i, "captioning/loss": 5 - i / 100 + noise[i], "lr": 0.1 * i} for i in range(200)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_runs([run])
    losses, rates = (axis for axis in figures[0].axes if axis.get_visible())
    (_, raw), (_, smooth) = curves(losses)
    assert [line.get_alpha() for line in losses.lines] == [0.3, None]
    assert np.diff(smooth).std() < np.diff(raw).std() / 4
    assert len(curves(rates)) == 1


def test_smoothing_keeps_what_is_straight_and_where_curves_begin_and_end() -> None:
    straight = [3.0 - i / 10 for i in range(90)]
    assert smoothed(straight) == pytest.approx(straight)
    values = list(np.random.default_rng(1).normal(size=SMOOTHED_FROM))
    assert (smoothed(values)[0], smoothed(values)[-1]) == (values[0], values[-1])
    assert smoothed(values)[3] == pytest.approx(np.mean(values[2:5]))


def test_names_that_occur_twice_are_told_apart(write_run: Callable[..., Path]) -> None:
    one, two, three = write_run("first/vqa"), write_run("second/vqa"), write_run("second/deep/vqa")
    assert titles([one, two]) == ["first", "second"]
    assert titles([one, two, three]) == ["first", "second", "second/deep"]
    assert titles([one, one.parent]) == ["vqa", "first"]
    assert len(set(titles([one, one]))) == 2


def test_many_runs_have_a_colour_each(write_run: Callable[..., Path], figures: list[Figure]) -> None:
    plot_runs([write_run(f"run{i}") for i in range(12)])
    lines = [line for line in figures[0].axes[0].lines if line.get_marker() != "x"]
    assert len({tuple(line.get_color()) for line in lines}) == 12


def test_what_is_a_curve() -> None:
    assert loss_names([{"loss": 1.0, "a/loss": 1.0, "b/loss": 1.0, "lr": 1.0}]) == ["a/loss", "b/loss"]
    assert loss_names([{"loss": 1.0}]) == ["loss"]
    found = score_curves([{"step": 5, "scores": {"x": {"CIDEr": 40.0, "distinct": 3.0}}}])
    assert found == {("x", "CIDEr"): ([5], [40.0])}


def test_damaged_lines_are_passed_over(write_run: Callable[..., Path]) -> None:
    run = write_run("a")
    whole = read_run(run)
    damaged = [3, None, [1], "train", {}, {"kind": "evaluation", "step": 30}]
    damaged += [{"kind": kind} for kind in ("train", "evaluation", "skipped")]
    damaged += [{"kind": "evaluation", "step": 30, "scores": None}]
    log = run / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in damaged) + log.read_text())
    assert read_run(run) == whole
    assert plot_runs([run]).exists()


def test_without_a_log_it_says_so(
    write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_run("good")
    (tmp_path / "empty").mkdir()
    for bad in (tmp_path / "none", tmp_path / "empty", good / "log.jsonl"):
        with pytest.raises(UserError, match=r"no log\.jsonl with training steps"):
            plot_runs([good, bad])
        assert main(["plot", str(good), str(bad)]) == 1
        assert (
            capsys.readouterr().err
            == f"vlm: {bad}: no log.jsonl with training steps; give the folder that --out named.\n"
        )
    assert not (good / "curves.png").exists()


def test_the_command_prints_where_the_picture_is(
    write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = write_run("run"), tmp_path / "deep/er/picture.png"
    assert main(["plot", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.exists()
    assert main(["plot", str(run), "--out", str(tmp_path / "picture.docx")]) == 1
    assert main(["plot", str(run), "--out", str(run / "log.jsonl" / "picture.png")]) == 1
    kind, place = capsys.readouterr().err.splitlines()
    assert "picture.docx: the picture cannot be written" in kind
    assert "log.jsonl/picture.png: cannot be written" in place


def test_a_picture_s_name_may_be_a_folder_or_without_an_ending(write_run: Callable[..., Path], tmp_path: Path) -> None:
    run = write_run("run")
    assert plot_runs([run], tmp_path) == tmp_path / "curves.png"
    assert plot_runs([run], tmp_path / "both") == tmp_path / "both.png"
    assert (tmp_path / "curves.png").exists()
    assert (tmp_path / "both.png").exists()
