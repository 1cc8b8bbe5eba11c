"""Micro-batches whose pair losses are the whole batch's. Run as a script, this file is one of two processes."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from vlm.config import Config, ImageConfig, ModelConfig, ObjectivesConfig, OptimizerConfig, TextConfig, TrainConfig
from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.cached import CachedLoss, Embedded
from vlm.objectives.pairs import Pairs
from vlm.tasks.pretraining import Pretraining
from vlm.tasks.task import Task
from vlm.train.distributed import Ranks
from vlm.train.meter import Meter
from vlm.train.trainer import Trainer

CPU = torch.device("cpu")
TEXT = TextConfig(
    vocab_size=64,
    dim=16,
    heads=2,
    layers=2,
    feed_forward_dim=32,
    max_positions=16,
    cross_attention=(0, 1),
    dropout=0.0,
    attention_dropout=0.0,
)
IMAGE = ImageConfig(name="test_vit", image_size=32)
OBJECTIVES = ObjectivesConfig(matching=0.0, masked_language=0.7, captioning=0.4)
CASES = {
    "softmax": OBJECTIVES,
    "sigmoid": replace(OBJECTIVES, contrastive=0.5, contrastive_loss="sigmoid"),
    # The queue has wrapped after the first step.
    "teacher": replace(OBJECTIVES, captioning=0.0, momentum=0.9, queue=100, alpha_ramp=0.0),
    "teacher_alone": replace(OBJECTIVES, captioning=0.0, masked_language=0.0, momentum=0.9, keys="local"),
}
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}


class Given:
    """In place of a loader: the trainer only asks how long an epoch is."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def iterate(self, epoch: int, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        raise NotImplementedError


def make_task(
    objectives: ObjectivesConfig,
    dtype: torch.dtype = torch.float64,
    image: ImageConfig = IMAGE,
    text: TextConfig = TEXT,
) -> Pretraining:
    torch.manual_seed(0)
    model = VisionLanguageModel(ModelConfig(image=image, text=text, embed_dim=8)).to(dtype)
    for parameter in (model.image_projection.weight, model.text_projection.weight):  # wide enough that a slip shows
        torch.nn.init.normal_(parameter, std=0.5)
    return Pretraining(model, objectives).to(dtype).train()


def make_trainer(task: Task, accumulate: int, ranks: Ranks | None = None, precision: Any = "fp32") -> Trainer:
    """Plain gradient descent without clipping, which leaves the gradients in place."""
    config = Config(
        optimizer=OptimizerConfig(lr=0.02, schedule="constant", warmup_steps=0, clip=0.0),
        train=TrainConfig(accumulate=accumulate, precision=precision),
    )
    trainer = Trainer(task, Given(10 * accumulate), config, ranks or Ranks(0, 1, CPU), None, lambda *_: Path())
    groups = [{k: g[k] for k in ("params", "factor", "lr")} for g in trainer.optimizer.param_groups]
    trainer.optimizer = torch.optim.SGD(groups)  # type: ignore[assignment]
    trainer.optimizer.zero_grad = lambda set_to_none: None  # type: ignore[assignment, misc]
    return trainer


def run(trainer: Trainer, steps: list[list[Batch]]) -> dict[str, Any]:
    """The losses, gradients and task's state after the last of the steps."""
    task = trainer.task
    task.train()
    for micro in steps:
        meter = Meter(task.weights)
        task.zero_grad()
        trainer._step(micro, meter)
    gradients = {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None and p.grad.any()}
    return {"losses": meter.take(trainer.ranks), "grads": gradients, "state": task.training_state()}


def whole(images: int, seed: int = 0) -> Batch:
    """Images that stand in several parts, two of them with two captions in all; a bad slot in the middle."""
    batch = Batch.fake(images, masked=True, seed=seed)
    extra = torch.tensor([*range(images), 1, images - 1]).sort().values
    texts = replace(batch.texts, **{f.name: getattr(batch.texts, f.name)[extra] for f in fields(batch.texts)})
    weight = torch.ones(len(extra))
    weight[images // 2] = 0
    assert batch.masked is not None
    masked = replace(batch.masked, ids=batch.masked.ids[extra])
    ids = torch.arange(images) % (images - 3) + seed
    return replace(batch, image_ids=ids, texts=replace(texts, weight=weight), masked=masked)


def parted(batch: Batch, count: int) -> list[Batch]:
    """Equal parts of its images, in order, with their texts."""
    size, length = len(batch) // count, batch.texts.ids.shape[1]
    found = []
    for start in range(0, len(batch), size):
        rows = (batch.texts.image >= start) & (batch.texts.image < start + size)
        first, last = int(rows.nonzero()[0]), int(rows.nonzero()[-1])
        texts = {f.name: getattr(batch.texts, f.name)[rows] for f in fields(batch.texts)}
        texts["image"] = texts["image"] - start
        masked = batch.masked
        assert masked is not None
        own = (masked.positions >= first * length) & (masked.positions < (last + 1) * length)
        found.append(
            replace(
                batch,
                images=batch.images[start : start + size],
                keys=batch.keys[start : start + size],
                image_ids=batch.image_ids[start : start + size],
                texts=replace(batch.texts, **texts),
                masked=replace(
                    masked,
                    ids=masked.ids[rows],
                    positions=masked.positions[own] - first * length,
                    labels=masked.labels[own],
                ),
            )
        )
    return found


def compare(found: dict[str, Any], expected: dict[str, Any], tolerance: float, where: str = "") -> None:
    """Losses, every gradient, relative to the largest of all (some are nothing but rounding), and the task's state."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=max(tolerance, 1e-6))  # the meter counts in fp32
    assert found["grads"].keys() == expected["grads"].keys()
    largest = max(float(value.abs().max()) for value in expected["grads"].values())
    for name, value in (expected["grads"] | expected["state"]).items():
        other = (found["grads"] | found["state"])[name]
        if ".queue." in name and value.ndim:  # its last row is nobody's
            value, other = value[:-1], other[:-1]
        difference = float((other - value).abs().max()) / largest
        assert difference <= tolerance, f"{where} {name}: {difference:.2e}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_eight_micro_batches_of_16_equal_one_of_128(case: str, dtype: torch.dtype) -> None:
    """A second step reads the first one's queue, but its weights hold the first one's rounding."""
    steps_made = 2 if case == "teacher" and dtype == torch.float64 else 1
    batches = [whole(128, seed) for seed in range(steps_made)]
    steps = [parted(batch, 8) for batch in batches]
    assert {len(part) for part in steps[0]} == {16}
    assert {len(part.texts.ids) for part in steps[0]} == {16, 17}
    expected = run(make_trainer(make_task(CASES[case], dtype), 1), [[batch] for batch in batches])
    found = run(make_trainer(make_task(CASES[case], dtype), 8), steps)
    assert {"model.temperature", "model.text.layers.0.self_attention.query.weight"} <= set(expected["grads"])
    assert ("learned.contrastive.bias" in expected["grads"]) == (case == "sigmoid")
    compare(found, expected, ROUNDING[dtype])


def test_two_processes_with_micro_batches_equal_one_process_without(tmp_path: Path) -> None:
    """Each has every second part, so that what is pushed and compared comes from all four; one part has more texts than the others."""
    command = [sys.executable, __file__, str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    expected = {case: run(make_trainer(make_task(CASES[case]), 1), [[whole(8, s)] for s in range(2)]) for case in CASES}
    for one in running:
        _, errors = one.communicate(timeout=600)
        assert one.returncode == 0, errors
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for case in set(CASES) - {"teacher_alone"}:  # keys of this rank alone
            compare(found[case], expected[case], ROUNDING[torch.float64], f"{case}, rank {rank}")


def process(folder: Path, rank: int) -> None:
    """One of the processes; leaves its results in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    steps = [parted(whole(8, seed), 4)[rank::2] for seed in range(2)]
    found = {case: run(make_trainer(make_task(CASES[case]), 2, Ranks(rank, 2, CPU)), steps) for case in CASES}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


Seen = tuple[list[Pairs], list[Pairs]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The pairs of the first and of the second passes."""
    first: list[Pairs] = []
    second: list[Pairs] = []
    embed, loss = Task.embed, CachedLoss.loss

    def note_first(self: Task, batch: Batch) -> Embedded:
        found = embed(self, batch)
        first.append(Pairs(*(part.clone() for part in found.own)))
        return found

    def note_second(self: CachedLoss, own: Pairs) -> Any:
        second.append(own.detached())
        return loss(self, own)

    monkeypatch.setattr(Task, "embed", note_first)
    monkeypatch.setattr(CachedLoss, "loss", note_second)
    return first, second


CHANCE = replace(TEXT, dropout=0.2, attention_dropout=0.2)
IMAGES = {
    "vit": replace(IMAGE, drop_path=0.3, patch_drop=0.5),
    "learnt statistics": replace(IMAGE, name="test_resnet"),
    "grouped convolutions": replace(IMAGE, name="test_efficientnet", batch_norm="frozen"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("image", IMAGES)
def test_the_second_pass_repeats_the_first_bit_for_bit(seen: Seen, image: str, precision: str) -> None:
    task = make_task(ObjectivesConfig(), torch.float32, IMAGES[image], CHANCE)
    trainer = make_trainer(task, 3, precision=precision)
    part = parted(whole(12), 3)[0]
    run(trainer, [[part, part, part]])
    first, second = seen
    assert len(first) == len(second) == 3
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.text, b.text)
    for a, b in [(first[0], first[1]), (first[1], first[2])]:  # chance falls differently for each
        assert torch.equal(a.image, b.image) == (image != "vit")  # the others draw nothing
        assert not torch.equal(a.text, b.text)
    run(trainer, [[part, part, part]])
    assert not torch.equal(first[0].text, first[3].text)  # and at each step


def test_statistics_are_learnt_once_from_each_micro_batch() -> None:
    image = IMAGES["learnt statistics"]
    tasks = [make_task(replace(OBJECTIVES, contrastive=c), image=image) for c in (1.0, 0.0)]
    buffers = []
    for task in tasks:
        run(make_trainer(task, 2), [parted(whole(8), 2)])
        buffers.append({n: b for n, b in task.named_buffers() if "running" in n or "tracked" in n})
    assert len(buffers[0]) > 10
    for name, expected in buffers[1].items():
        assert torch.equal(buffers[0][name], expected), name


def test_checkpointing_of_both_encoders_changes_nothing() -> None:
    """With dropout and stochastic depth, which fall in the recomputation as they did."""
    found = []
    calls: list[Counter[str]] = []
    for on in (False, True):
        image = replace(IMAGES["vit"], checkpointing=on)
        task = make_task(ObjectivesConfig(), image=image, text=replace(CHANCE, checkpointing=on))
        calls.append(Counter())
        for name in ("text.layers.1", "image_encoder.backbone.blocks.1"):
            hook = partial(lambda name, *_: calls[-1].update([name]), name)
            task.model.get_submodule(name).register_forward_pre_hook(hook)
        found.append(run(make_trainer(task, 2), [parted(whole(8), 2)]))
    assert {name: calls[1][name] - count for name, count in calls[0].items()} == {
        "text.layers.1": 4,  # of each micro-batch the plain texts and the fused ones; the first pass goes back nowhere
        "image_encoder.backbone.blocks.1": 2,
    }
    assert found[0]["losses"] == found[1]["losses"]
    for name, gradient in found[0]["grads"].items():
        assert torch.equal(found[1]["grads"][name], gradient), name


@pytest.mark.parametrize(("objectives", "count"), [(replace(OBJECTIVES, contrastive=0.0), 2), (OBJECTIVES, 1)])
def test_one_pass_is_enough_where_nothing_is_compared(seen: Seen, objectives: ObjectivesConfig, count: int) -> None:
    run(make_trainer(make_task(objectives), count), [parted(whole(8), count)])
    assert seen == ([], [])


if __name__ == "__main__":
    process(Path(sys.argv[1]), int(sys.argv[2]))
