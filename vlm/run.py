"""What `vlm train` does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.build import (
    Parts,
    answers_questions,
    build_parts,
    build_task,
    evaluation_loader,
    load_sets,
    training_loader,
)
from vlm.checkpoint import read_answers, write_checkpoint
from vlm.config import Config, Head
from vlm.data.batch import Batch
from vlm.data.index import ShardSet
from vlm.data.loader import Loader
from vlm.data.places import check_sources
from vlm.data.scan import scan
from vlm.errors import ConfigError
from vlm.evaluation import evaluate_loader, named, start
from vlm.files import replace_text
from vlm.held_out import check_held_out, training_images
from vlm.hub import local_folder
from vlm.model.compiler import need_compiler
from vlm.model.pretrained import load_metadata, restore_folder
from vlm.order_settings import as_begun
from vlm.samples import SampleBook
from vlm.settings import config_to_yaml
from vlm.settings_check import check_lengths
from vlm.tasks.task import Task
from vlm.train import distributed
from vlm.train.data_order import STREAMS, data_order
from vlm.train.distributed import Ranks
from vlm.train.precision import settled
from vlm.train.report import say
from vlm.train.state import load_state
from vlm.train.stopping import stops_at_once
from vlm.train.trackers import check_trackers
from vlm.train.trainer import Trainer


def train(config: Config, resume: bool = False) -> dict[str, Any]:
    """Trains as `config` says; the scores of the last evaluation.

    Raises:
        UserError: what the user can mend. StoppedOnRequest: a signal asked for it, the state is saved.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(config.train.deterministic or before)
    out = Path(config.out)
    try:
        with stops_at_once():
            trainer = _set_up(config, start(), resume)
        if trainer.finished:
            say(f"{out} is finished: {trainer.step} of {trainer.total_steps} steps are done.")
            return trainer.scores
        scores = trainer.fit()
        best = f" and {out}/best" if (out / "best").is_dir() else ""
        if trainer.ranks.main:
            say(f"done: checkpoints in {out}/latest{best}, log in {out}/log.jsonl")
        return scores
    finally:
        distributed.stop()
        torch.use_deterministic_algorithms(before)


def _set_up(config: Config, ranks: Ranks, resume: bool) -> Trainer:
    """Everything up to the first step, or to the one that a run goes on from."""
    check_trackers(config.train.trackers)
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
    state = load_state(latest) if resuming else {}
    if resuming:
        config = _streams_as_saved(as_begun(config, out), state)
    config = settled(config, ranks)
    # A state fits the model that it is of, whatever heads a new run would have.
    heads = load_metadata(latest)["model"]["heads"] if resuming else ()
    built = build_run(config, ranks, heads)
    parts, loader = built.parts, built.loader

    def save(name: str, model: nn.Module, scores: dict[str, Any], state: dict[str, Any] | None) -> Path:
        tokenizer_json = parts.tokenizer.to_json()
        return write_checkpoint(
            out / name, parts.config, model, tokenizer_json, scores, built.trained_on, built.answers, state
        )

    order = data_order(config.data, config.seed, loader.streams, loader.sets)
    evaluation = _Evaluation(built, ranks) if built.held_out else None
    trainer = Trainer(built.task, loader, config, ranks, evaluation, save, order)
    if evaluation is not None:
        evaluation.trainer = trainer
    torch.manual_seed(config.seed + 1000 * ranks.rank)
    if resuming:
        trainer.load_state(state)
    if ranks.main:
        replace_text(out / "config.yaml", config_to_yaml(config))
        introduce(parts, loader, trainer, ranks)
    return trainer


def _streams_as_saved(config: Config, state: Mapping[str, Any]) -> Config:
    """The settings with the streams that the saved run had, where they leave these open: what is chosen then depends on where the shards lie."""
    saved = (state.get("order") or {}).get(STREAMS)
    if config.data.streams is not None or saved is None:
        return config
    return replace(config, data=replace(config.data, streams=saved))


class _Evaluation:
    """A run's evaluations of its validation splits. trainer: the run's, which is made after this."""

    trainer: Trainer

    def __init__(self, built: "BuiltRun", ranks: Ranks) -> None:
        sets = named(built.held_out)
        self.ranks, self.config = ranks, built.parts.config
        self.loaders = {
            name: _Interruptible(
                evaluation_loader(self.config, built.parts, shards, ranks), lambda: self.trainer.leave()
            )
            for name, shards in sets.items()
        }
        self.book = SampleBook(built.parts, sets)

    def __call__(self, task: Task) -> tuple[dict[str, Any], float | None]:
        """Scores by set, and the mean over the sets of the one that selects; None where no set has it."""
        images = self.config.train.evaluate_images
        scores = {
            name: evaluate_loader(task, loader, self.ranks, f"evaluating on {name}", images)[0]
            for name, loader in self.loaders.items()
        }
        self.book.show(task, self.trainer.step, self.trainer.log)
        selecting = [found[task.metric] for found in scores.values() if task.metric in found]
        return scores, sum(selecting) / len(selecting) if selecting else None


class _Interruptible(Loader):
    """A loader that calls `leave` before each of its batches, on every rank as often, though a rank's batches without samples are passed over."""

    def __init__(self, loader: Loader, leave: Callable[[], None]) -> None:
        vars(self).update(vars(loader))
        self._leave = leave

    def iterate(self, epoch: int, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        left = (self.steps if stop_step is None else stop_step) - start_step
        for batch in super().iterate(epoch, start_step, stop_step):
            self._leave()
            left -= 1
            yield batch
        for _ in range(left):
            self._leave()


@dataclass(frozen=True)
class BuiltRun:
    """What a run trains, and on what. trained_on: the images of this and earlier stages. answers: those that the model can choose from."""

    parts: Parts
    task: Task
    loader: Loader
    held_out: list[ShardSet]
    trained_on: Tensor | None
    answers: list[str]


def build_run(config: Config, ranks: Ranks, heads: Sequence[Head] = ()) -> BuiltRun:
    """From settings to model, task and data. heads: those of the run that goes on.

    Raises:
        UserError: shards are missing, settings do not fit each other, a held-out image was trained on, or a compiler is wanted that is not there.
    """
    if config.train.compile:
        need_compiler(ranks.device)
    sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache, config.data.order)
    check_sources(sets)
    held_out = [load_sets([folder], "data.splits.val", config.data.cache)[0] for folder in config.data.splits.val]
    answers = known_answers(config, sets)
    parts = build_parts(config, sets, answers, heads)
    check_lengths(parts.config)
    trained_on = training_images(sets, config.init_from)
    for shards in held_out:
        check_held_out(trained_on, shards, config.data.allow_overlap)
    if config.task == "vqa":
        _check_answers(config, named(held_out))
    task = build_task(parts.config, parts, answers, sets)
    return BuiltRun(parts, task, training_loader(config, parts, sets, ranks), held_out, trained_on, answers)


def _check_answers(config: Config, held_out: Mapping[str, ShardSet]) -> None:
    """Of questions that nobody answered, as a test split's, nothing can be scored: such a set is shown but selects no checkpoint.

    Raises:
        ConfigError: there are only such sets.
    """
    batch = config.data.batch_size
    images = -(-config.train.evaluate_images // batch) * batch  # as many as an evaluation reads
    silent = [
        name
        for name, shards in held_out.items()
        if not any(q.get("answers") for record in islice(scan([shards]), images) for q in record.questions)
    ]
    if silent and len(silent) == len(held_out):
        raise ConfigError(
            f"data.splits.val: none of the questions of {', '.join(silent)} has an answer (of the {images} images that an evaluation reads, "
            "train.evaluate_images), so no checkpoint could be chosen; give a split with answers, or none at all."
        )
    for name in silent:
        say(f"{name}: none of its questions has an answer, so it does not count in choosing the best checkpoint")


def introduce(parts: Parts, loader: Loader, trainer: Trainer, ranks: Ranks) -> None:
    """Says what is trained, on what, for how long."""
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


def known_answers(config: Config, sets: Sequence[ShardSet]) -> list[str]:
    """The answers that the model can choose from: the training questions', or those of the checkpoint that a stage without questions starts from."""
    if not answers_questions(config):  # a stage on captions alone does not forget which answers the model knows
        if config.task != "pretraining" or config.init_from is None:
            return []
        return read_answers(local_folder(config.init_from))
    from vlm.tasks.vqa import answer_list

    classify = config.task == "vqa" and config.vqa.form == "classify"
    if config.vqa.inference == "generate" and not classify:
        return []
    return answer_list(sets, config.vqa.min_answer_count, commonest=classify)
