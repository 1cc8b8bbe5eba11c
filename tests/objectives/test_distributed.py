"""Two processes give the losses and gradients of one on the joined batch. Run as a script, this file is one of the two processes."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vlm.config import ImageConfig, ModelConfig, ObjectivesConfig, TextConfig
from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.tasks.pretraining import Pretraining

WORLD, IMAGES = 2, 3
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
WEIGHTS = {"contrastive": 1.0, "masked_language": 0.7, "captioning": 0.4}


def task() -> Pretraining:
    """Matching is left out: its negatives are drawn, on each rank from its own images."""
    torch.manual_seed(0)
    config = ModelConfig(image=ImageConfig(name="test_vit", image_size=32), text=TEXT, embed_dim=8)
    model = VisionLanguageModel(config).double()
    for parameter in (model.image_projection.weight, model.text_projection.weight):
        torch.nn.init.normal_(parameter, std=0.5)
    return Pretraining(model, ObjectivesConfig(**WEIGHTS, matching=0.0))


def part(rank: int) -> Batch:
    """Unequal in everything that divides: words, masked words, a bad slot; and an image that both ranks hold."""
    batch = Batch.fake(IMAGES, vocab_size=32, masked=True, seed=rank)
    if rank == 0:
        return replace(batch, texts=replace(batch.texts, weight=torch.tensor([1.0, 1.0, 0.0])))
    return replace(batch, image_ids=torch.tensor([2, 12, 13]))


def joined(parts: list[Batch]) -> Batch:
    """The batch that one process would have."""
    length = parts[0].texts.ids.shape[1]

    def cat(name: str, inner: str) -> Tensor:
        return torch.cat([getattr(getattr(p, name), inner) for p in parts])

    texts = {f.name: cat("texts", f.name) for f in fields(parts[0].texts)}
    masked = {f.name: cat("masked", f.name) for f in fields(parts[0].masked)}  # type: ignore[arg-type]
    first = parts[0].masked
    assert first is not None
    texts["image"][IMAGES:] += IMAGES
    masked["positions"][len(first.positions) :] += IMAGES * length
    return replace(
        parts[0],
        images=torch.cat([p.images for p in parts]),
        image_ids=torch.cat([p.image_ids for p in parts]),
        keys=[key for p in parts for key in p.keys],
        texts=replace(parts[0].texts, **texts),
        masked=replace(first, **masked),
    )


def step(batch: Batch, world: int) -> dict[str, Any]:
    """What the trainer does with a batch: counts over all ranks, the factor `world` against DDP's mean."""
    own = task()
    wrapped = DistributedDataParallel(own, broadcast_buffers=False, find_unused_parameters=True) if world > 1 else own
    counts = torch.stack([count.double() for count in own.counts(batch).values()])
    if world > 1:
        dist.all_reduce(counts)
    losses = wrapped(batch)
    weighted = [own.weights[name] * losses[name].sum / counts[i] for i, name in enumerate(own.weights)]
    (sum(weighted) * world).backward()
    values = torch.stack([value.detach() for value in weighted])
    if world > 1:
        dist.all_reduce(values)
    return {"losses": values, "grads": {name: p.grad for name, p in own.model.named_parameters()}}


def process(rank: int, folder: Path) -> None:
    """One of the two processes; leaves its results in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    torch.save(step(part(rank), WORLD), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(WORLD)]
    expected = step(joined([part(rank) for rank in range(WORLD)]), 1)
    for one in running:
        _, errors = one.communicate(timeout=120)
        assert one.returncode == 0, errors
    assert all(value > 0 for value in expected["losses"])
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=0, atol=1e-10)
        touched = 0
        for name, gradient in expected["grads"].items():
            if gradient is None:  # the matching head
                assert found["grads"][name] is None or not found["grads"][name].any(), name
                continue
            torch.testing.assert_close(found["grads"][name], gradient, rtol=0, atol=1e-10, msg=name)
            touched += bool(gradient.abs().max() > 1e-8)
        assert touched > 100


if __name__ == "__main__":
    process(int(sys.argv[2]), Path(sys.argv[1]))
