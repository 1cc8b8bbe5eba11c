"""Two and four processes give the losses and gradients of one on the joined batch. Run as a script, this file is one of the processes."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vlm.config import ImageConfig, ModelConfig, ObjectivesConfig, TextConfig
from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives import matching
from vlm.tasks.pretraining import Pretraining

IMAGES, STEPS = 3, 3
TEXT = TextConfig(
    vocab_size=32,
    dim=16,
    heads=2,
    layers=2,
    feed_forward_dim=32,
    max_positions=16,
    cross_attention=(0, 1),
    dropout=0.0,
    attention_dropout=0.0,
)
QUIET = ObjectivesConfig(contrastive=1.0, matching=0.0, masked_language=0.7, captioning=0.4)
# The queue wraps in the second step of two processes, and is outrun by a single step of four.
CASES = {
    "in_batch": QUIET,
    "sigmoid": replace(QUIET, captioning=0.0, masked_language=0.0, contrastive_loss="sigmoid"),
    "negatives": ObjectivesConfig(negatives="joined"),
    "uneven": QUIET,
    "uneven_sigmoid": replace(QUIET, captioning=0.0, masked_language=0.0, contrastive_loss="sigmoid"),
    "uneven_negatives": ObjectivesConfig(negatives="joined"),
    "late_negatives": ObjectivesConfig(contrastive=0.0, negatives="joined"),
    "masked_image": replace(QUIET, contrastive=0.0, captioning=0.0, masked_image=0.5),
    "word_patch": replace(QUIET, contrastive=0.0, captioning=0.0, word_patch=0.5, negatives="joined"),
    "uneven_word_patch": replace(QUIET, contrastive=0.0, captioning=0.0, word_patch=0.5, negatives="joined"),
    "teacher": replace(QUIET, captioning=0.0, momentum=0.9, queue=8, alpha_ramp=1.0),
}


def hardest(similarity: Tensor, eligible: Tensor, itself: Tensor) -> Tensor:
    """In place of a draw, which every number of processes would make differently."""
    return similarity.masked_fill(~eligible, float("-inf")).argmax(1)


def task(name: str) -> Pretraining:
    """A model whose weights are wide enough that a slip shows."""
    torch.manual_seed(0)
    late: dict[str, Any] = {"fusion": "late", "text": replace(TEXT, cross_attention=(1,))} if "late" in name else {}
    config = ModelConfig(image=ImageConfig(name="test_vit", image_size=32), **({"text": TEXT, "embed_dim": 8} | late))
    model = VisionLanguageModel(config)
    for parameter in (model.image_projection.weight, model.text_projection.weight):
        torch.nn.init.normal_(parameter, std=0.5)
    made = Pretraining(model, CASES[name]).double().train()
    made.prepare(epoch_steps=4)
    return made


def part(rank: int, step: int) -> Batch:
    """Unequal in everything that divides: length, words, masked words, a bad slot; and an image that two ranks, and two steps, hold."""
    batch = Batch.fake(IMAGES, vocab_size=32, length=8 + 8 * (rank % 2), masked=True, patches=4, seed=100 * step + rank)
    if rank == 0:
        batch = replace(batch, texts=replace(batch.texts, weight=torch.tensor([1.0, 1.0, 0.0])))
    return replace(batch, image_ids=torch.tensor([2, 10 * rank + 2 + step, 10 * rank + 5]))


def uneven(rank: int, step: int) -> Batch:
    """As `part`, but the second rank's last image has two captions."""
    batch = part(rank, step)
    if rank != 1:
        return batch
    rows = torch.tensor([0, 1, 2, 2])
    texts = replace(batch.texts, **{f.name: getattr(batch.texts, f.name)[rows] for f in fields(batch.texts)})
    assert batch.masked is not None
    return replace(batch, texts=texts, masked=replace(batch.masked, ids=batch.masked.ids[rows]))


DATA = {name: uneven if "uneven" in name else part for name in CASES}


def joined(parts: list[Batch]) -> Batch:
    """The batch that one process would have."""
    length = max(p.texts.ids.shape[1] for p in parts)
    parts = [p.lengthened(length, 0) for p in parts]

    def cat(name: str, inner: str) -> Tensor:
        return torch.cat([getattr(getattr(p, name), inner) for p in parts])

    texts = {f.name: cat("texts", f.name) for f in fields(parts[0].texts)}
    masked = {f.name: cat("masked", f.name) for f in fields(parts[0].masked)}  # type: ignore[arg-type]
    hidden = [len(p.masked.positions) for p in parts if p.masked is not None]
    rank, rows = torch.arange(len(parts)), torch.tensor([len(p.texts.ids) for p in parts])
    before = rows.cumsum(0) - rows
    texts["image"] = texts["image"] + IMAGES * rank.repeat_interleave(rows)
    masked["positions"] = masked["positions"] + length * before.repeat_interleave(torch.tensor(hidden))
    assert parts[0].masked is not None
    return replace(
        parts[0],
        images=torch.cat([p.images for p in parts]),
        image_ids=torch.cat([p.image_ids for p in parts]),
        keys=[key for p in parts for key in p.keys],
        texts=replace(parts[0].texts, **texts),
        masked=replace(parts[0].masked, **masked),
        hidden=torch.cat([p.hidden for p in parts if p.hidden is not None]),
    )


def steps(name: str, batches: list[Batch], world: int) -> dict[str, Any]:
    """What the trainer does with batches: counts over all ranks, the factor `world` against DDP's mean. Losses and gradients of the last step."""
    own = task(name)
    wrapped = DistributedDataParallel(own, broadcast_buffers=False, find_unused_parameters=True) if world > 1 else own
    for batch in batches:
        counts = torch.stack([count.double() for count in own.counts(batch).values()])
        if world > 1:
            dist.all_reduce(counts)
        losses = wrapped(batch)
        weighted = [own.weights[name] * losses[name].sum / counts[i] for i, name in enumerate(own.weights)]
        own.zero_grad()
        (sum(weighted) * world).backward()
        values = torch.stack([value.detach() for value in weighted])
        if world > 1:
            dist.all_reduce(values)
        trained = {name: p for name, p in own.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in trained.values():
                if parameter.grad is not None:
                    parameter -= 0.02 * parameter.grad
        own.after_step()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in trained.items()}
    return {"losses": values, "grads": grads, "state": own.training_state()}


def process(rank: int, world: int, folder: Path) -> None:
    """One of the processes; leaves its results in `folder`."""
    torch.set_num_threads(1)
    matching.sample_negatives = hardest
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found = {name: steps(name, [DATA[name](rank, step) for step in range(STEPS)], world) for name in CASES}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setattr(matching, "sample_negatives", hardest)
    command = [sys.executable, __file__, str(tmp_path), str(world)]
    running = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(world)]
    batches = {
        name: [joined([DATA[name](rank, step) for rank in range(world)]) for step in range(STEPS)] for name in CASES
    }
    alone = {name: steps(name, batches[name], 1) for name in CASES}
    for one in running:
        _, errors = one.communicate(timeout=120)
        assert one.returncode == 0, errors
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt")
        for case, expected in alone.items():
            compare(found[case], expected, f"{case}, rank {rank}")


def compare(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Every loss, gradient and tensor of the task's state."""
    assert all(value > 0 for value in expected["losses"])
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=0, atol=1e-10, msg=f"{where}: losses")
    touched = 0
    for name, gradient in expected["grads"].items():
        if gradient is None:  # a head that no objective uses
            assert found["grads"][name] is None or not found["grads"][name].any(), f"{where}: {name}"
            continue
        torch.testing.assert_close(found["grads"][name], gradient, rtol=0, atol=1e-10, msg=f"{where}: {name}")
        touched += bool(gradient.abs().max() > 1e-8)
    assert touched > 60
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        if not name.startswith("teacher.queue") or value.ndim == 0:
            torch.testing.assert_close(found["state"][name], value, rtol=0, atol=1e-10, msg=f"{where}: {name}")
        else:  # its last row is nobody's
            torch.testing.assert_close(
                found["state"][name][:-1], value[:-1], rtol=0, atol=1e-10, msg=f"{where}: {name}"
            )


if __name__ == "__main__":
    process(int(sys.argv[3]), int(sys.argv[2]), Path(sys.argv[1]))
