"""The published recipes make models that learn: each takes a step, in small by default, in full size in the slow suite."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlm.build import Parts, build_task, image_hiding
from vlm.config import Config
from vlm.data.batch import Batch
from vlm.data.text import train_wordpiece
from vlm.model.vision_language import VisionLanguageModel
from vlm.settings import load_config
from vlm.train.optimizer import build_optimizer, schedule

FOLDER = Path(__file__).parents[1] / "configs/pretrain"
FINETUNING = sorted(
    str(path.relative_to(FOLDER.parent).with_suffix(""))
    for path in (FOLDER.parent / "finetune").rglob("*.yaml")
    if path.stem.startswith(("albef", "blip"))
)
OWN = ("tiny", "photos_small", "compact")
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith(OWN))


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
    task = build_task(config, Parts(config, tokenizer, VisionLanguageModel(config.model)), ["red", "dog"]).train()
    task.prepare(10)
    optimizer = build_optimizer(task.model, config.optimizer, task.learned)
    masked = config.objectives.masked_language > 0
    vocab_size = min(64, config.model.text.vocab_size)
    hiding = image_hiding(config, task.model.image_encoder)
    batch = Batch.fake(
        images,
        size,
        vocab_size,
        answers=config.task == "vqa",
        masked=masked,
        patches=hiding.grid[0] * hiding.grid[1] if hiding else 0,
    )
    for _ in range(2):  # the second meets the queue
        losses, counts = task(batch), task.counts(batch)
        total = sum(task.weights[name] * losses[name].sum / counts[name] for name in task.weights)
        assert isinstance(total, torch.Tensor)
        total.backward()
        gradients = [p.grad for p in task.parameters() if p.grad is not None]
        assert len(gradients) > 20
        assert all(gradient.isfinite().all() for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()
        task.after_step()
    return {name: float(loss.sum / loss.count) for name, loss in losses.items()}


def test_there_are_recipes() -> None:
    assert {"albef_base", "blip_base", "blip_large", "masked_both", "mlm_itm", "resnet50_fusion"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_in_small(name: str) -> None:
    config = shrunk(offline(load_config(FOLDER / f"{name}.yaml")))
    losses = step(config, 4, config.model.image.image_size or 0)
    weights = {"contrastive", "matching", "masked_language", "masked_image", "word_patch", "captioning"}
    assert set(losses) == {key for key in weights if getattr(config.objectives, key) > 0}
    factor = schedule(config.optimizer, 100_000, 1000)
    assert 0 < factor(0) < factor(config.optimizer.warmup_steps - 1) <= 1
    assert factor(99_999) < 0.2


def test_there_are_recipes_of_fine_tuning() -> None:
    assert {Path(name).parent.name for name in FINETUNING} == {"captioning", "retrieval", "vqa"}


@pytest.mark.parametrize("name", FINETUNING)
def test_a_step_of_fine_tuning_in_small(name: str) -> None:
    published = load_config(FOLDER.parent / f"{name}.yaml")
    assert published.model.image.image_size == (480 if name == "finetune/vqa/blip_base" else 384)
    assert published.init_from in {
        load_config(FOLDER / f"{start}_base.yaml").out + "/latest" for start in ("albef", "blip")
    }
    config = shrunk(offline(published))
    losses = step(config, 4, config.model.image.image_size or 0)
    assert set(losses) == ({"contrastive", "matching"} if config.task == "pretraining" else {"captioning"})
    factor = schedule(config.optimizer, 100_000, 1000)
    assert factor(max(0, config.optimizer.warmup_steps - 1)) == 1
    assert factor(99_999) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"pretrain/{name}" for name in RECIPES] + FINETUNING)
def test_a_step_in_full_size(name: str) -> None:
    config = offline(load_config(FOLDER.parent / f"{name}.yaml"))
    losses = step(config, 2, config.model.image.image_size or 224)
    # An answer's loss is the sum of its tokens', each log(30,522) at the start.
    words = config.data.max_answer_tokens if config.task == "vqa" else 1
    assert all(0 <= value < 20 * words for value in losses.values())
