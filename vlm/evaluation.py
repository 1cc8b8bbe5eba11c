"""What `vlm evaluate` does, and a run's evaluations while it trains: predictions, scores, intervals, baselines, and where they come from."""

import dataclasses
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm.build import Parts, build_task, evaluation_loader, load_sets
from vlm.checkpoint import read_answers, read_trained_on
from vlm.config import Config
from vlm.data.index import ShardSet
from vlm.data.loader import Loader
from vlm.data.official import in_server_form
from vlm.data.text import Tokenizer
from vlm.errors import UserError
from vlm.evaluation_vqa import AnswersEvaluation, counting_baselines
from vlm.files import write_json
from vlm.held_out import check_held_out
from vlm.hub import local_folder
from vlm.memory import keep_freed_memory
from vlm.model.pretrained import load_pretrained
from vlm.quantize import quantize
from vlm.tasks.task import Record, Task
from vlm.train import distributed
from vlm.train.distributed import Ranks
from vlm.train.precision import autocast, settled
from vlm.train.report import number, say

PACKAGES = ("torch", "torchvision", "timm", "tokenizers", "webdataset", "pillow")


def start() -> Ranks:
    """Joins the ranks, if torchrun started several."""
    ranks = distributed.start()
    if ranks.device.type == "cpu":
        keep_freed_memory()
    return ranks


def evaluate_loader(
    task: Task, loader: Loader, ranks: Ranks, title: str, images: int | None = None
) -> tuple[dict[str, float], list[Record]]:
    """Scores and records of one set, or of about its first `images` images; each record counted once over all ranks.

    Raises:
        UserError: on every rank, where too many of all their samples cannot be used, or all.
    """
    records: list[Record] = []
    steps = loader.steps
    if images is not None:
        steps = min(steps, -(-images // loader.batch_size))
    pause = 0.1 if sys.stderr.isatty() else 20.0  # a log file wants few lines
    with tqdm(total=steps, desc=title, unit="batch", disable=not ranks.main, leave=False, mininterval=pause) as bar:
        for batch in loader.iterate(0, stop_step=steps):
            records += task.predict(batch.to(ranks.device))
            bar.update()
    loader.check(ranks.gather)
    # By key, whoever predicted them: scores, and intervals that are drawn, do not depend on the number of ranks.
    # Several tars may have a key in common.
    records = sorted(ranks.gather(records), key=lambda record: (str(record["key"]), str(record.get("image_id"))))
    left_out: Counter[str] = Counter()
    for part in ranks.gather([dict(loader.bad)]):
        left_out.update(part)
    if not records:
        causes = ", ".join(f"{count} x {cause}" for cause, count in sorted(left_out.items()))
        raise UserError(
            f"{title}: none of {left_out.total()} samples can be used ({causes}); `vlm shards check` names them."
        )
    scores = task.evaluate(records)
    if left_out:
        scores["left_out"] = float(left_out.total())
        scores |= {f"left_out/{cause}": float(count) for cause, count in sorted(left_out.items())}
    if ranks.main:
        say(f"{title}: " + ", ".join(f"{name} {number(value)}" for name, value in scores.items()))
    return scores, records


def _answer_list(config: Config, checkpoint: Path) -> list[str]:
    """The checkpoint's answers; where it has none, as converted ones, and ranks, those of the training questions, as ALBEF and BLIP make their list.

    Raises:
        UserError: there are no training questions at hand.
    """
    answers = read_answers(checkpoint)
    if answers or config.task != "vqa" or config.vqa.form == "classify" or config.vqa.inference == "generate":
        return answers
    from vlm.tasks.vqa import answer_list

    folders = config.data.splits.train
    try:
        answers = answer_list(load_sets(folders, "data.splits.train", config.data.cache), config.vqa.min_answer_count)
    except UserError as error:
        raise UserError(
            f"{checkpoint} has no answer list, and there is none to make of the training questions: {error} "
            "Or let it answer freely: --vqa.inference generate."
        ) from None
    say(
        f"{checkpoint} has no answer list: {len(answers):,} answers are taken from the questions of {', '.join(folders)}"
    )
    return answers


def evaluate(
    config: Config,
    checkpoint: Path,
    split: str,
    out: Path,
    quantized: str | None = None,
    calibrate: bool = False,
) -> dict[str, Any]:
    """Scores of a checkpoint on a split; writes predictions.json in the official form and results.json into `out`, of answers answers.html too.

    quantized: "int8", with such weights (see `vlm.quantize`). calibrate: the temperature of the answers' confidence is fitted on this split and
    stored in the checkpoint.

    Raises:
        UserError: the split is empty or was trained on, a file is missing, the answers cannot be calibrated.
    """
    folders = getattr(config.data.splits, split)
    held_out = load_sets(folders, f"data.splits.{split}", config.data.cache)
    ranks = start()
    try:
        config = settled(config, ranks)
        given, checkpoint = checkpoint, local_folder(checkpoint)
        model, _ = load_pretrained(checkpoint)
        parts = Parts(dataclasses.replace(config, model=model.config), Tokenizer.load(checkpoint), model)
        trained_on = read_trained_on(checkpoint)
        for shards in held_out if split != "train" else ():
            check_held_out(trained_on, shards, config.data.allow_overlap)
        task = build_task(parts.config, parts, _answer_list(config, checkpoint)).to(ranks.device).eval()
        if quantized is not None:
            quantize(task.model, quantized)
        answers = AnswersEvaluation(task, parts.tokenizer, checkpoint, given, split, calibrate)
        scores: dict[str, Any] = {}
        intervals: dict[str, dict[str, tuple[float, float]]] = {}
        found: dict[str, list[Record]] = {}
        for name, shards in named(held_out).items():
            loader = evaluation_loader(config, parts, shards, ranks)
            with autocast(config.train.precision, ranks.device):
                scores[name], found[name] = evaluate_loader(task, loader, ranks, f"{split} of {name}")
            if config.task == "vqa":
                scores[name] |= counting_baselines(config, found[name], name)
            intervals[name] = task.intervals(found[name])
            told = (f"{key} {number(low)} to {number(high)}" for key, (low, high) in intervals[name].items())
            if intervals[name] and ranks.main:
                say(f"95 % intervals, {name}: " + ", ".join(told))
        report = answers.finish(found, scores, ranks.main)
        if ranks.main:
            predictions: list[Record] = []
            for name, shards in named(held_out).items():
                own = [*task.official(found[name]), *answers.unanswered(shards, found[name], scores[name])]
                predictions += in_server_form(own, shards.root)
            results = {
                "split": split,
                "checkpoint": str(checkpoint),
                "quantized": quantized,
                "scores": scores,
                "intervals": intervals,
                **report,
                **provenance(config),
            }
            write_json(out / "predictions.json", predictions)
            write_json(out / "results.json", results)
            answers.write_page(out, named(held_out), found, results)
            say(f"wrote {out / 'predictions.json'} ({len(predictions)} predictions) and {out / 'results.json'}")
            answers.store()
        return scores
    finally:
        distributed.stop()


def provenance(config: Config) -> dict[str, Any]:
    """Settings, commit and versions: what a score needs to be believed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        here = Path(__file__).parent
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"config": dataclasses.asdict(config), "commit": commit, "versions": versions}


def named(sets: Sequence[ShardSet]) -> dict[str, ShardSet]:
    """Sets by source, with their folders where a source comes twice."""
    sources = [shards.source for shards in sets]
    return {s.source if sources.count(s.source) == 1 else s.root: s for s in sets}
