"""What `vlm train` and `vlm evaluate` do."""

import dataclasses
import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from vlm.build import (
    Parts,
    answers_questions,
    build_parts,
    build_task,
    check_held_out,
    evaluation_loader,
    load_sets,
    training_images,
    training_loader,
)
from vlm.checkpoint import read_answers, read_trained_on, write_checkpoint
from vlm.config import Config
from vlm.data.index import ShardSet
from vlm.data.loader import Loader
from vlm.data.scan import scan
from vlm.data.text import Tokenizer
from vlm.errors import ConfigError, UserError
from vlm.hub import local_folder
from vlm.memory import keep_freed_memory
from vlm.model.pretrained import load_pretrained, restore_folder
from vlm.settings import config_to_yaml
from vlm.settings_check import check_lengths
from vlm.tasks.task import Record, Task
from vlm.train import distributed
from vlm.train.distributed import Ranks
from vlm.train.report import number, replace_text, say
from vlm.train.state import load_state
from vlm.train.trainer import Trainer

PACKAGES = ("torch", "torchvision", "timm", "tokenizers", "webdataset", "pillow")


def train(config: Config, resume: bool = False) -> dict[str, Any]:
    """Trains as `config` says; the scores of the last evaluation.

    Raises:
        UserError: what the user can mend. StoppedOnRequest: a signal asked for it, the state is saved.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(config.train.deterministic or before)
    ranks = _start()
    try:
        return _train(config, ranks, resume)
    finally:
        distributed.stop()
        torch.use_deterministic_algorithms(before)


def _start() -> Ranks:
    ranks = distributed.start()
    if ranks.device.type == "cpu":
        keep_freed_memory()
    return ranks


def _train(config: Config, ranks: Ranks, resume: bool) -> dict[str, Any]:
    out = Path(config.out)
    latest = out / "latest"
    if ranks.main:
        restore_folder(latest)
    ranks.barrier()
    resuming = resume and latest.is_dir()
    if not resume and (latest.is_dir() or (out / "log.jsonl").exists()):
        raise ConfigError(
            f"out={out} holds a run already; add --resume auto to go on with it, choose another --out, or remove it."
        )
    sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache)
    held_out = [load_sets([folder], "data.splits.val", config.data.cache)[0] for folder in config.data.splits.val]
    parts = build_parts(config, sets)
    check_lengths(parts.config)
    trained_on = training_images(sets, config.init_from)
    for shards in held_out:
        check_held_out(trained_on, shards, config.data.allow_overlap)
    answers = _answer_list(config, sets)
    task = build_task(parts.config, parts, answers, sets)
    loader = training_loader(config, parts, sets, ranks)
    evaluators = {name: evaluation_loader(config, parts, shards, ranks) for name, shards in _named(held_out).items()}

    def evaluate(task: Task) -> tuple[dict[str, Any], float]:
        scores = {
            name: evaluate_loader(task, data, ranks, f"evaluating on {name}", config.train.evaluate_images)[0]
            for name, data in evaluators.items()
        }
        return scores, sum(s[task.metric] for s in scores.values()) / len(scores)

    def save(name: str, model: nn.Module, scores: dict[str, Any], state: dict[str, Any] | None) -> Path:
        tokenizer_json = parts.tokenizer.to_json()
        return write_checkpoint(out / name, parts.config, model, tokenizer_json, scores, trained_on, answers, state)

    trainer = Trainer(task, loader, config, ranks, evaluate if evaluators else None, save)
    torch.manual_seed(config.seed + 1000 * ranks.rank)
    if resuming:
        trainer.load_state(load_state(latest))
    if ranks.main:
        replace_text(out / "config.yaml", config_to_yaml(config))
        _introduce(parts, loader, trainer, ranks)
    if trainer.step >= trainer.total_steps:
        say(f"{out} is finished: {trainer.step} of {trainer.total_steps} steps are done.")
        return trainer.scores
    scores = trainer.fit()
    if ranks.main:
        say(f"done: checkpoints in {out}/latest{f' and {out}/best' if evaluators else ''}, log in {out}/log.jsonl")
    return scores


def _introduce(parts: Parts, loader: Loader, trainer: Trainer, ranks: Ranks) -> None:
    config = parts.config
    counts = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in parts.model.named_children()}
    trained = sum(p.numel() for p in parts.model.parameters() if p.requires_grad) / 1e6
    listed = ", ".join(f"{name} {count:.1f}" for name, count in counts.items() if count >= 0.05)
    say(
        f"{config.task} into {config.out}: {loader.samples:,} images, {trainer.epoch_steps} steps an epoch, {trainer.total_steps} in all, "
        f"batch {config.data.batch_size}, {ranks.world} x {ranks.device.type}, {config.train.precision}"
    )
    say(f"parameters in millions: {sum(counts.values()):.1f} ({listed}); trained: {trained:.1f}")
    if trainer.step:
        say(f"going on from step {trainer.step}")


def evaluate_loader(
    task: Task, loader: Loader, ranks: Ranks, title: str, images: int | None = None
) -> tuple[dict[str, float], list[Record]]:
    """Scores and records of one set, or of about its first `images` images; each record counted once over all ranks."""
    records: list[Record] = []
    steps = loader.steps
    if images is not None:
        steps = min(steps, -(-images // loader.batch_size))
    pause = 0.1 if sys.stderr.isatty() else 20.0  # a log file wants few lines
    with tqdm(total=steps, desc=title, unit="batch", disable=not ranks.main, leave=False, mininterval=pause) as bar:
        for index, batch in enumerate(loader.iterate(0)):
            if index == steps:
                break
            records += task.predict(batch.to(ranks.device))
            bar.update()
    records = ranks.gather(records)
    scores = task.evaluate(records)
    left_out: Counter[str] = Counter()
    for part in ranks.gather([dict(loader.bad)]):
        left_out.update(part)
    if left_out:
        scores["left_out"] = float(left_out.total())
        scores |= {f"left_out/{cause}": float(count) for cause, count in sorted(left_out.items())}
    if ranks.main:
        say(f"{title}: " + ", ".join(f"{name} {number(value)}" for name, value in scores.items()))
    return scores, records


def evaluate(config: Config, checkpoint: Path, split: str, out: Path) -> dict[str, Any]:
    """Scores of a checkpoint on a split; writes predictions.json in the official form and results.json into `out`.

    Raises:
        UserError: the split is empty or was trained on, a file is missing.
    """
    folders = getattr(config.data.splits, split)
    held_out = load_sets(folders, f"data.splits.{split}", config.data.cache)
    ranks = _start()
    try:
        checkpoint = local_folder(checkpoint)
        model, _ = load_pretrained(checkpoint)
        parts = Parts(dataclasses.replace(config, model=model.config), Tokenizer.load(checkpoint), model)
        trained_on = read_trained_on(checkpoint)
        for shards in held_out if split != "train" else ():
            check_held_out(trained_on, shards, config.data.allow_overlap)
        task = build_task(parts.config, parts, read_answers(checkpoint)).to(ranks.device).eval()
        scores: dict[str, Any] = {}
        intervals: dict[str, dict[str, tuple[float, float]]] = {}
        predictions: list[Record] = []
        for name, shards in _named(held_out).items():
            loader = evaluation_loader(config, parts, shards, ranks)
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
                scores[name], records = evaluate_loader(task, loader, ranks, f"{split} of {name}")
            if config.task == "vqa":
                scores[name] |= _counting_baselines(config, records, name)
            predictions += task.official(records)
            intervals[name] = task.intervals(records)
            told = (f"{key} {number(low)} to {number(high)}" for key, (low, high) in intervals[name].items())
            if intervals[name] and ranks.main:
                say(f"95 % intervals, {name}: " + ", ".join(told))
        if ranks.main:
            write_json(out / "predictions.json", predictions)
            write_json(
                out / "results.json",
                {
                    "split": split,
                    "checkpoint": str(checkpoint),
                    "scores": scores,
                    "intervals": intervals,
                    **provenance(config),
                },
            )
            say(f"wrote {out / 'predictions.json'} ({len(predictions)} predictions) and {out / 'results.json'}")
        return scores
    finally:
        distributed.stop()


def _counting_baselines(config: Config, records: Sequence[Record], name: str) -> dict[str, float]:
    """What counting training answers alone would score: the commonest one, and the commonest for a question's first words."""
    from vlm.metrics.baselines import fit_question_type_baseline
    from vlm.metrics.vqa import accuracy

    try:
        sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache)
    except UserError as error:  # a model may be scored where its training data are not
        say(f"no baselines by counting training answers: {error}")
        return {}
    records = [r for r in records if r["references"]]
    trained = [q for record in scan(sets) for q in record.questions if q.get("answers")]
    if not records or not trained:
        return {}
    by_type = fit_question_type_baseline([q["question"] for q in trained], [q["answers"] for q in trained])
    guesses = {
        "baseline/commonest_answer": lambda _: by_type.overall,
        "baseline/by_first_words": by_type.answer,
    }
    found = {
        key: 100 * sum(accuracy(guess(r["question"]), r["references"]) for r in records) / len(records)
        for key, guess in guesses.items()
    }
    say(
        f"without any model, {name}: "
        + ", ".join(f"{key.removeprefix('baseline/')} {number(value)}" for key, value in found.items())
    )
    return found


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


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _named(sets: Sequence[ShardSet]) -> dict[str, ShardSet]:
    """Sets by source, with their folders where a source comes twice."""
    sources = [shards.source for shards in sets]
    return {s.source if sources.count(s.source) == 1 else s.root: s for s in sets}


def _answer_list(config: Config, sets: Sequence[ShardSet]) -> list[str]:
    if not answers_questions(config):  # a stage on captions alone does not forget which answers the model knows
        if config.task != "pretraining" or config.init_from is None:
            return []
        return read_answers(local_folder(config.init_from))
    from vlm.tasks.vqa import answer_list

    if config.vqa.inference == "generate":
        return []
    return answer_list(sets, config.vqa.min_answer_count)


def dry_run(config: Config) -> None:
    """Shows what `train` would do: settings, parameters by part, the first batch, and the time of one step; writes nothing."""
    ranks = _start()
    try:
        _dry_run(config, ranks)
    finally:
        distributed.stop()


def _dry_run(config: Config, ranks: Ranks) -> None:
    sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache)
    held_out = [load_sets([folder], "data.splits.val", config.data.cache)[0] for folder in config.data.splits.val]
    parts = build_parts(config, sets)
    check_lengths(parts.config)
    trained_on = training_images(sets, config.init_from)
    for shards in held_out:
        check_held_out(trained_on, shards, config.data.allow_overlap)
    task = build_task(parts.config, parts, _answer_list(config, sets), sets)
    loader = training_loader(config, parts, sets, ranks)

    def refuse(name: str, *_: Any) -> Path:
        raise RuntimeError(f"a dry run saves nothing, {name} was asked for")

    trainer = Trainer(task, loader, config, ranks, None, refuse)
    say(config_to_yaml(parts.config))
    _introduce(parts, loader, trainer, ranks)
    batch = next(loader.iterate(0))
    say(f"images {tuple(batch.images.shape)} {batch.images.dtype}, texts {tuple(batch.texts.ids.shape)}")
    for row in range(min(4, len(batch.texts.ids))):
        ids, prompt = batch.texts.ids[row][batch.texts.mask[row]].tolist(), int(batch.texts.prompt[row])
        say(
            f"  {batch.keys[int(batch.texts.image[row])]}: {parts.tokenizer.decode(ids)!r} ({len(ids)} tokens, prompt {prompt})"
        )
    for line in trainer.try_step([batch] * config.train.accumulate):
        say(line)
