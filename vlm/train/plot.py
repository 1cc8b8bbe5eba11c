"""Curves of runs from their log.jsonl: losses, rate and scores, where people would rather look than read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.train.report import read_json_lines


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
        out = out.with_name(f"{out.name}.png")  # as matplotlib would do it unseen
    logs = {title: read_run(run) for title, run in zip(titles(runs), runs, strict=True)}
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for title, (train, evaluations) in logs.items():
        for name in loss_names(train):
            axes[0].plot(*points(train, name), label=f"{title} {name.removesuffix('/loss')}", linewidth=1.2)
        axes[1].plot(*points(train, "lr"), label=title)
        for name, curve in score_curves(evaluations).items():
            axes[2].plot(*zip(*curve, strict=True), marker="o", markersize=3, label=f"{title} {name}")
    for axis, title in zip(axes, ("loss", "learning rate", "scores while training"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=7)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
        raise UserError(
            f"{out}: the picture cannot be written ({error}); give --out NAME.png in a folder that you may write."
        ) from None
    finally:
        pyplot.close(figure)
    return out


def titles(runs: Sequence[Path]) -> list[str]:
    """The runs' names in the legend: their folders' names, or the whole paths where these are the same."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def read_run(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training lines and the evaluation lines of a run's log.

    Raises:
        UserError: there is none.
    """
    lines = read_json_lines(run / "log.jsonl")
    train = [line for line in lines if line.get("kind") == "train"]
    if not train:
        raise UserError(f"{run}: no log.jsonl with training steps; give the folder that --out named.")
    return train, [line for line in lines if line.get("kind") == "evaluation"]


def loss_names(train: Sequence[dict[str, Any]]) -> list[str]:
    """The single losses, or the total where there is one only."""
    names = [name for name in train[0] if name.endswith("/loss")]
    return names if len(names) > 1 else ["loss"]


def points(train: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a figure, where it was logged."""
    lines = [line for line in train if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def score_curves(evaluations: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """By set and score the (step, value) pairs, of the scores that people compare."""
    wanted = {"mean_R@1", "CIDEr", "Bleu_4", "accuracy"}
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in evaluations:
        for name, scores in line["scores"].items():
            for score, value in scores.items():
                if score in wanted:
                    curves.setdefault(f"{name} {score}", []).append((line["step"], value))
    return curves
