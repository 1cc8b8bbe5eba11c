"""The published recipes make models that learn: each takes a step, in small by default, in full size in the slow suite."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlm.build import Parts, build_task
from vlm.config import Config
from vlm.data.batch import Batch
from vlm.data.text import train_wordpiece
from vlm.model.vision_language import VisionLanguageModel
from vlm.settings import load_config
from vlm.train.optimizer import build_optimizer, schedule

FOLDER = Path(__file__).parents[1] / "configs/pretrain"
RECIPES = sorted({path.stem for path in FOLDER.glob("*.yaml")} - {"tiny", "photos_small", "compact"})


def offline(config: Config) -> Config:
    """Nothing is downloaded: the weights are random."""
    return replace(
        config, model=replace(config.model, image=replace(config.model.image, pretrained=False, weights=None))
    )


def shrunk(config: Config) -> Config:
    """The same structure at a tiny size."""
    image, text = config.model.image, config.model.text
    small = {"vit": "test_vit", "deit": "test_vit", "resnet50": "test_resnet"}
    name = next(value for key, value in small.items() if image.name.startswith(key))
    text = replace(text, dim=32, heads=2, feed_forward_dim=64, vocab_size=64, max_positions=32)
    size = 160 if name == "test_vit" else 64
    model = replace(
        config.model, image=replace(image, name=name, image_size=size, drop_path=0.0), text=text, embed_dim=16
    )
    return replace(config, model=model, objectives=replace(config.objectives, queue=min(config.objectives.queue, 8)))


def step(config: Config, images: int, size: int) -> dict[str, float]:
    """The losses of one step; every trained parameter that any objective reaches has a finite gradient."""
    torch.manual_seed(0)
    tokenizer = train_wordpiece(["a red dog"], 60, min_frequency=1)
    task = build_task(config, Parts(config, tokenizer, VisionLanguageModel(config.model))).train()
    task.prepare(10)
    optimizer = build_optimizer(task.model, config.optimizer)
    masked = config.objectives.masked_language > 0
    batch = Batch.fake(images, image_size=size, vocab_size=min(64, config.model.text.vocab_size), masked=masked)
    for _ in range(2):  # the second meets the queue
        losses, counts = task(batch), task.counts(batch)
        total = sum(task.weights[name] * losses[name].sum / counts[name] for name in task.weights)
        assert isinstance(total, torch.Tensor)
        total.backward()
        gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
        assert len(gradients) > 20
        assert all(gradient.isfinite().all() for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()
        task.after_step()
    return {name: float(loss.sum / loss.count) for name, loss in losses.items()}


def test_there_are_recipes() -> None:
    assert {"albef_base", "blip_base", "blip_large", "mlm_itm", "resnet50_fusion"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_in_small(name: str) -> None:
    config = shrunk(offline(load_config(FOLDER / f"{name}.yaml")))
    losses = step(config, 4, config.model.image.image_size or 0)
    weights = {"contrastive", "matching", "masked_language", "captioning"}
    assert set(losses) == {key for key in weights if getattr(config.objectives, key) > 0}
    factor = schedule(config.optimizer, 100_000, 1000)
    assert 0 < factor(0) < factor(config.optimizer.warmup_steps - 1) <= 1
    assert factor(99_999) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_in_full_size(name: str) -> None:
    config = offline(load_config(FOLDER / f"{name}.yaml"))
    losses = step(config, 2, config.model.image.image_size or 224)
    assert all(0 <= value < 20 for value in losses.values())
