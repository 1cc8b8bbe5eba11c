"""`vlm train --dry-run`: what a run would do, shown before it starts."""

from pathlib import Path
from typing import Any

from vlm.build import build_parts, build_task, check_held_out, load_sets, training_images, training_loader
from vlm.config import Config
from vlm.evaluation import start
from vlm.run import introduce, known_answers
from vlm.settings import config_to_yaml
from vlm.settings_check import check_lengths
from vlm.train import distributed
from vlm.train.distributed import Ranks
from vlm.train.report import say
from vlm.train.trainer import Trainer


def dry_run(config: Config) -> None:
    """Shows what `train` would do: settings, parameters by part, the first batch, and the time of one step; writes nothing."""
    ranks = start()
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
    task = build_task(parts.config, parts, known_answers(config, sets), sets)
    loader = training_loader(config, parts, sets, ranks)

    def refuse(name: str, *_: Any) -> Path:
        raise RuntimeError(f"a dry run saves nothing, {name} was asked for")

    trainer = Trainer(task, loader, config, ranks, None, refuse)
    say(config_to_yaml(parts.config))
    introduce(parts, loader, trainer, ranks)
    batch = next(loader.iterate(0))
    say(f"images {tuple(batch.images.shape)} {batch.images.dtype}, texts {tuple(batch.texts.ids.shape)}")
    for row in range(min(4, len(batch.texts.ids))):
        ids, prompt = batch.texts.ids[row][batch.texts.mask[row]].tolist(), int(batch.texts.prompt[row])
        say(
            f"  {batch.keys[int(batch.texts.image[row])]}: {parts.tokenizer.decode(ids)!r} ({len(ids)} tokens, prompt {prompt})"
        )
    for line in trainer.try_step([batch] * config.train.accumulate):
        say(line)
