"""Curves from made-up logs: everything that was logged is drawn, what cannot be drawn is said in one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from vlm.cli import main
from vlm.errors import UserError
from vlm.train.plot import loss_names, plot_runs, read_run, score_curves, titles


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """write_run(name, losses): a run of 4 log lines with these losses, evaluated twice."""

    def write(name: str, losses: tuple[str, ...] = ("contrastive", "matching")) -> Path:
        lines: list[dict[str, Any]] = []
        for step in (10, 20, 30, 40):
            single = {f"{loss}/loss": 3.0 - step / 20 for loss in losses}
            lines.append({"kind": "train", "step": step, "loss": 5.0 - step / 10, "lr": 1e-3 / step, **single})
        for step in (20, 40):
            scores = {"scenes": {"mean_R@1": step / 2, "images": 64.0}, "photos": {"mean_R@1": step / 4}}
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


def test_all_curves_of_two_runs_are_drawn(write_run: Callable[..., Path], figures: list[Figure]) -> None:
    one, two = write_run("first/vqa", ("captioning",)), write_run("second/pretrain")
    picture = plot_runs([one, two])
    assert picture == one / "curves.png"
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
    losses, rates, scores = figures[0].axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in losses.lines}
    assert drawn == {
        "vqa loss": ([10, 20, 30, 40], [4.0, 3.0, 2.0, 1.0]),
        "pretrain contrastive": ([10, 20, 30, 40], [2.5, 2.0, 1.5, 1.0]),
        "pretrain matching": ([10, 20, 30, 40], [2.5, 2.0, 1.5, 1.0]),
    }
    assert [line.get_label() for line in rates.lines] == ["vqa", "pretrain"]
    assert len(scores.lines) == 4
    assert list(scores.lines[0].get_ydata()) == [10.0, 20.0]


def test_a_run_without_evaluations_and_with_gaps(write_run: Callable[..., Path], figures: list[Figure]) -> None:
    run = write_run("a")
    lines = list(read_run(run)[0])
    del lines[1]["lr"], lines[2]["matching/loss"]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_runs([run])
    losses, rates, scores = figures[0].axes
    assert list(rates.lines[0].get_xdata()) == [10, 30, 40]
    assert [list(line.get_xdata()) for line in losses.lines] == [[10, 20, 30, 40], [10, 20, 40]]
    assert not scores.lines


def test_names_that_occur_twice_are_told_apart(write_run: Callable[..., Path]) -> None:
    one, two = write_run("first/vqa"), write_run("second/vqa")
    assert titles([one, two]) == [str(one), str(two)]
    assert titles([one, one.parent]) == ["vqa", "first"]


def test_what_is_a_curve() -> None:
    assert loss_names([{"loss": 1.0, "a/loss": 1.0, "b/loss": 1.0, "lr": 1.0}]) == ["a/loss", "b/loss"]
    assert loss_names([{"loss": 1.0, "a/loss": 1.0}]) == ["loss"]
    assert score_curves([{"step": 5, "scores": {"x": {"CIDEr": 40.0, "distinct": 3.0}}}]) == {"x CIDEr": [(5, 40.0)]}


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
    for line in capsys.readouterr().err.splitlines():
        assert "the picture cannot be written" in line


def test_a_picture_s_name_may_be_a_folder_or_without_an_ending(write_run: Callable[..., Path], tmp_path: Path) -> None:
    run = write_run("run")
    assert plot_runs([run], tmp_path) == tmp_path / "curves.png"
    assert plot_runs([run], tmp_path / "both") == tmp_path / "both.png"
    assert (tmp_path / "curves.png").exists()
    assert (tmp_path / "both.png").exists()
