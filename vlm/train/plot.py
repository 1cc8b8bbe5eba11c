"""Curves of runs from their log.jsonl: losses, scores, rate and speed, where people would rather look than read.

A panel for each loss and each score; a run has the same colour in all of them, a set of images the same marker.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.files import write_figure
from vlm.train.report import read_json_lines

SCORES = ("mean_R@1", "CIDEr", "Bleu_4", "accuracy")
"""Those that people compare."""
FIGURES = {"lr": "learning rate", "samples_per_second": "samples a second"}
MARKERS = "os^Dv*Px"
MOST_COLUMNS = 4
SMOOTHED_FROM = 20  # points; fewer are drawn as they are
Curve = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Log:
    """A run's lines by their kind."""

    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    skipped: list[int]


def plot_runs(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Draws a picture of one or several runs (folders with a log.jsonl); its path. out: a file or a folder; by default the first run's.

    Raises:
        UserError: a run has no log, matplotlib is not installed, or the picture cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'vlm-fusion[demo]'.") from None
    out = out or runs[0]
    if out.is_dir():
        out = out / "curves.png"
    elif not out.suffix:
        out = out.with_name(f"{out.name}.png")
    figure = draw({title: read_run(run) for title, run in zip(titles(runs), runs, strict=True)})
    write_figure(figure, out, dpi=110)
    pyplot.close(figure)
    return out


def draw(logs: dict[str, Log]) -> Any:
    """The figure. logs: by the run's title."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    losses = [*dict.fromkeys(name for log in logs.values() for name in loss_names(log.train))]
    curves = [score_curves(log.evaluations) for log in logs.values()]
    sets = [*dict.fromkeys(name for found in curves for name, _ in found)]
    scores = [score for score in SCORES if any(score == found for run in curves for _, found in run)]
    figures = [name for name in FIGURES if any(name in line for log in logs.values() for line in log.train)]
    names = [*losses, *scores, *figures]
    columns = min(MOST_COLUMNS, len(names), round((1.8 * len(names)) ** 0.5))
    rows = -(-len(names) // columns)
    size = (max(4.4 * columns, 7), 3.1 * rows + 0.25 * (1 + len(logs) // 4))
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    colours = pyplot.get_cmap("tab10" if len(logs) <= 10 else "turbo").resampled(10 if len(logs) <= 10 else len(logs))
    for axis, name in zip(grid.flat, names, strict=False):
        axis.set_title(f"{name.removesuffix('/loss')} loss" if name.endswith("/loss") else FIGURES.get(name, name))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for number, (log, found) in enumerate(zip(logs.values(), curves, strict=True)):
            if name in scores:
                _draw_scores(axis, found, name, sets, colours(number))
            else:
                _draw_values(axis, points(log.train, name), colours(number), exact=name == "lr")
            if name in losses and points(log.train, name)[0]:
                _draw_skipped(axis, log.skipped, colours(number))
    for axis in grid.flat[len(names) :]:
        axis.set_visible(False)
    _add_legend(figure, [*logs], sets, colours, any(log.skipped for log in logs.values()))
    return figure


def _draw_values(axis: Any, curve: Curve, colour: Any, exact: bool) -> None:
    """Lightly what was logged, strongly its smoothed course; one line where it is exact or has few points."""
    steps, values = curve
    if not steps:
        return
    if exact or len(steps) < SMOOTHED_FROM:
        axis.plot(steps, values, color=colour, linewidth=1.4)
        return
    axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axis.plot(steps, smoothed(values), color=colour, linewidth=1.5)


def _draw_scores(axis: Any, curves: dict[tuple[str, str], Curve], score: str, sets: Sequence[str], colour: Any) -> None:
    for (name, found), curve in curves.items():
        if found == score:
            marker = MARKERS[sets.index(name) % len(MARKERS)]
            axis.plot(*curve, color=colour, marker=marker, markersize=4, linewidth=1.2)


def _draw_skipped(axis: Any, steps: Sequence[int], colour: Any) -> None:
    """A mark at the foot of the panel for each step that was not made."""
    if steps:
        foot = axis.get_xaxis_transform()
        axis.plot(steps, [0.03] * len(steps), "x", color=colour, markersize=6, transform=foot, clip_on=False)


def _add_legend(figure: Any, runs: Sequence[str], sets: Sequence[str], colours: Any, skipped: bool) -> None:
    """Below the panels: colours are runs, markers are sets."""
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], color=colours(i), linewidth=2, label=run) for i, run in enumerate(runs)]
    plain: dict[str, Any] = {"color": "0.3", "linestyle": "none"}
    entries += [Line2D([], [], marker=MARKERS[i % len(MARKERS)], label=name, **plain) for i, name in enumerate(sets)]
    if skipped:
        entries.append(Line2D([], [], marker="x", label="skipped step", **plain))
    figure.legend(handles=entries, loc="outside lower center", ncols=min(4, len(entries)), fontsize=8, frameon=False)


def titles(runs: Sequence[Path]) -> list[str]:
    """The runs' names in the legend: their folders' names, or where these are the same what their paths differ in."""
    paths = [run.resolve().parts for run in runs]
    names = [path[-1] for path in paths]
    if len(set(names)) == len(names):
        return names
    while len({path[0] for path in paths}) == 1 and min(map(len, paths)) > 1:
        paths = [path[1:] for path in paths]
    while len({path[-1] for path in paths}) == 1 and min(map(len, paths)) > 1:
        paths = [path[:-1] for path in paths]
    names = ["/".join(path) for path in paths]
    return names if len(set(names)) == len(names) else [f"{i}: {name}" for i, name in enumerate(names, 1)]


def read_run(run: Path) -> Log:
    """What a run's log holds; damaged lines are passed over, as those that are cut short.

    Raises:
        UserError: no training steps.
    """
    lines = [line for line in read_json_lines(run / "log.jsonl") if "step" in line]
    by_kind = {
        kind: [line for line in lines if line.get("kind") == kind] for kind in ("train", "evaluation", "skipped")
    }
    if not by_kind["train"]:
        raise UserError(f"{run}: no log.jsonl with training steps; give the folder that --out named.")
    evaluations = [line for line in by_kind["evaluation"] if isinstance(line.get("scores"), dict)]
    return Log(by_kind["train"], evaluations, [line["step"] for line in by_kind["skipped"]])


def loss_names(train: Sequence[dict[str, Any]]) -> list[str]:
    """The single losses, or the total where none is named."""
    return [name for name in train[0] if name.endswith("/loss")] or ["loss"]


def points(train: Sequence[dict[str, Any]], name: str) -> Curve:
    """Steps and values of a figure, where it was logged."""
    lines = [line for line in train if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over windows of about a twentieth of the curve, each around its value; narrower towards both ends, so that they stay where they are."""
    half = max(1, len(values) // 40)
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


def score_curves(evaluations: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Curve]:
    """By set and score the steps and values of the scores that people compare."""
    curves: dict[tuple[str, str], Curve] = {}
    for line in evaluations:
        for name, scores in line["scores"].items():
            for score in SCORES:
                if score in scores:
                    steps, values = curves.setdefault((name, score), ([], []))
                    steps.append(line["step"])
                    values.append(scores[score])
    return curves
