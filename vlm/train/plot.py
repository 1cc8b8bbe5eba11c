"""Curves of runs from their log.jsonl: losses, rate and scores, where people would rather look than read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.train.report import read_json_lines


def plot_runs(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Draws a PNG of one or several runs (folders with a log.jsonl); its path.

    Raises:
        UserError: a run has no log, or matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'vlm-fusion[demo]'.") from None
    out = out or runs[0] / "curves.png"
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for run in runs:
        train, evaluations = read_run(run)
        steps = [line["step"] for line in train]
        for name in loss_names(train):
            axes[0].plot(
                steps, [line[name] for line in train], label=f"{run.name} {name.removesuffix('/loss')}", linewidth=1.2
            )
        axes[1].plot(steps, [line["lr"] for line in train], label=run.name)
        for name, points in score_curves(evaluations).items():
            axes[2].plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{run.name} {name}")
    for axis, title in zip(axes, ("loss", "learning rate", "scores while training"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return out


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
