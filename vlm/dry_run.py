"""`vlm train --dry-run`: what a run would do, shown before it starts."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.config import Config
from vlm.data.batch import Batch
from vlm.evaluation import start
from vlm.run import build_run, introduce
from vlm.settings import config_to_yaml
from vlm.train import distributed
from vlm.train.compiling import Compiled, watch_compiling
from vlm.train.cost import held, peak_memory
from vlm.train.distributed import Ranks
from vlm.train.precision import settled
from vlm.train.report import say
from vlm.train.trainer import Trainer


def dry_run(config: Config) -> None:
    """Shows what `train` would do: settings, parameters by part, the first batch, and the time of one step; writes nothing."""
    ranks = start()
    try:
        _dry_run(settled(config, ranks), ranks)
    finally:
        distributed.stop()


def _dry_run(config: Config, ranks: Ranks) -> None:
    if config.data.features is not None:  # nothing is written, so the images are encoded
        config = replace(config, data=replace(config.data, features=None))
    built = build_run(config, ranks)
    parts, loader = built.parts, built.loader

    def refuse(name: str, *_: Any) -> Path:
        raise RuntimeError(f"a dry run saves nothing, {name} was asked for")

    trainer = Trainer(built.task, loader, config, ranks, None, refuse)
    say(config_to_yaml(parts.config))
    introduce(parts, loader, trainer, ranks)
    batch = next(loader.iterate(0))
    for name, tensor in _tensors(batch):
        say(f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
    for row in range(min(4, len(batch.texts.ids))):
        ids, prompt = batch.texts.ids[row][batch.texts.mask[row]].tolist(), int(batch.texts.prompt[row])
        key = batch.keys[int(batch.texts.image[row])]
        say(f"  {key}: {parts.tokenizer.decode(ids)!r} ({len(ids)} tokens, prompt {prompt})")
    _try(trainer, [batch] * config.train.accumulate, config)


def _tensors(part: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch and of its parts, by name."""
    for field in fields(part):
        value, name = getattr(part, field.name), f"{prefix}{field.name}"
        if isinstance(value, Tensor):
            yield name, value
        elif is_dataclass(value):
            yield from _tensors(value, f"{name}.")


def _try(trainer: Trainer, micro: list[Batch], config: Config) -> None:
    """One step, and what it took; with train.compile a second one, which is compiled."""
    trainer.cost.measures = True
    for line in trainer.try_step(micro):
        say(line)
    cost = trainer.cost
    assert cost.per_sample is not None
    known = (
        "" if cost.peak is None else f", of which {cost.name} does at most {cost.peak / cost.per_sample:.0f} a second"
    )
    say(f"{cost.per_sample / 1e9:.3g} GFLOP a sample, forward and backward, 2 a multiply-add{known}")
    say(_memory(trainer))
    if config.train.compile:
        found: list[Compiled] = []
        with watch_compiling(found):
            line = trainer.try_step(micro)[-1]
        say(f"{found[0]}; with compiling, {line}")


def _memory(trainer: Trainer) -> str:
    """What a step holds on this device, in MiB: tensors as they are after one, the activations as the forward pass kept them."""
    task, averaged = trainer.task, trainer.averaging.averaged
    model = {id(tensor) for tensor in [*task.model.parameters(), *task.model.buffers(), *task.learned.parameters()]}
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    sizes = {
        "parameters": held(tensor for tensor in [*task.parameters(), *task.buffers()] if id(tensor) in model),
        "gradients": held(trained),
        "AdamW": held(value for state in trainer.optimizer.state.values() for value in state.values()),
        "teacher and queue": held(t for t in [*task.parameters(), *task.buffers()] if id(t) not in model),
        "averaged copy": 0 if averaged is None else held([*averaged.parameters(), *averaged.buffers()]),
        f"activations of a micro-batch of {trainer.cost.samples}": sum(trainer.cost.activations.values()),
    }
    listed = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items() if size)
    most = peak_memory(trainer.ranks.device) / 2**20
    whose = "tensors on the GPU" if trainer.ranks.device.type == "cuda" else "this process, data and library included,"
    return f"memory in MiB, at least: {sum(sizes.values()) / 2**20:.0f} ({listed}); {whose} took {most:.0f} at most"
