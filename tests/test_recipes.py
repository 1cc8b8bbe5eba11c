"""Every recipe makes a model that learns: it takes a step, in small by default; the published ones in full size in the slow suite."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlm.build import Parts, build_task, image_hiding
from vlm.checkpoint import write_checkpoint
from vlm.config import Config
from vlm.data.batch import Batch
from vlm.data.synthetic import write_scenes
from vlm.data.text import train_wordpiece
from vlm.model.vision_language import VisionLanguageModel
from vlm.run import BuiltRun, build_run
from vlm.settings import load_config
from vlm.train.distributed import Ranks
from vlm.train.optimizer import build_optimizer, schedule

FOLDER = Path(__file__).parents[1] / "configs/pretrain"
FINETUNING = sorted(
    str(path.relative_to(FOLDER.parent).with_suffix(""))
    for path in (FOLDER.parent / "finetune").rglob("*.yaml")
    if path.stem.startswith(("albef", "blip"))
)
OWN = ("tiny", "photos_small", "compact", "easy_vqa", "meter")
"""Recipes of models so small that their stages are built one from the other's checkpoint; METER's classifier, whose answers come from data, too."""
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith(OWN))
STAGES = [
    str(path.relative_to(FOLDER.parent).with_suffix(""))
    for path in sorted(FOLDER.parent.rglob("*.yaml"))
    if path.stem.startswith(OWN)
]


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


def test_every_recipe_takes_a_step() -> None:
    everything = {str(path.relative_to(FOLDER.parent).with_suffix("")) for path in FOLDER.parent.rglob("*.yaml")}
    assert {f"pretrain/{name}" for name in RECIPES} | set(FINETUNING) | set(STAGES) == everything


Build = Callable[[str], tuple[BuiltRun, Path]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """built(recipe): the run on drawn scenes, and a checkpoint of its model. A recipe that goes on starts from the one whose `out` it names."""
    root, known = tmp_path_factory.mktemp("recipes"), dict[str, tuple[BuiltRun, Path]]()
    write_scenes(root / "scenes", 24, 8, size=64, samples_per_shard=8)

    def build(name: str) -> tuple[BuiltRun, Path]:
        if name not in known:
            config = on_scenes(load_config(FOLDER.parent / f"{name}.yaml"), root)
            if config.init_from is not None:
                out, checkpoint = config.init_from.rsplit("/", 1)
                assert checkpoint in ("latest", "best")
                config = replace(config, init_from=str(build(_made_by(out))[1]))
            run = build_run(config, Ranks(0, 1, torch.device("cpu")))
            folder = root / "checkpoints" / name
            parts = run.parts
            write_checkpoint(folder, parts.config, parts.model, parts.tokenizer.to_json(), {}, answers=run.answers)
            known[name] = run, folder
        return known[name]

    return build


def _made_by(out: str) -> str:
    """The recipe that writes into a folder."""
    paths = [path for path in FOLDER.parent.rglob("*.yaml") if load_config(path).out == out]
    assert len(paths) == 1, f"{len(paths)} recipes write into {out}"
    return str(paths[0].relative_to(FOLDER.parent).with_suffix(""))


def on_scenes(config: Config, root: Path) -> Config:
    """The recipe with narrow layers, without files from elsewhere, on the drawn scenes below `root`."""
    config, data = offline(config), config.data
    text = replace(config.model.text, dim=32, heads=2, feed_forward_dim=64)
    image = replace(config.model.image, image_size=64)
    small = {"deit": "test_vit", "tf_efficientnet": "test_efficientnet"}
    image = replace(image, name=next((new for old, new in small.items() if image.name.startswith(old)), image.name))
    splits = replace(data.splits, train=(f"{root}/scenes/train",), val=(f"{root}/scenes/val",), test=())
    features = None if data.features is None else f"{root}/features-{Path(config.out).name}"
    return replace(
        config,
        text_weights=None,
        model=replace(config.model, image=image, text=text, embed_dim=16),
        tokenizer=replace(config.tokenizer, trim_to=(), min_count=1),
        data=replace(data, splits=splits, batch_size=4, workers=0, features=features),
        vqa=replace(config.vqa, min_answer_count=1),
        train=replace(config.train, precision="fp32"),
        objectives=replace(config.objectives, queue=min(config.objectives.queue, 8)),
    )


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_in_small(name: str, built: Build) -> None:
    """From weights by name to a step on records with captions, questions and answers; what the recipe weighs is what is learned."""
    run, _ = built(name)
    config, task = run.parts.config, run.task.train()
    task.prepare(10)
    optimizer = build_optimizer(task.model, config.optimizer, task.learned)
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    batch = next(run.loader.iterate(0, stop_step=1))
    losses, counts = task(batch), task.counts(batch)
    total = sum(task.weights[key] * losses[key].sum / counts[key] for key in task.weights)
    assert isinstance(total, torch.Tensor)
    total.backward()
    optimizer.step()
    assert total.isfinite()
    state = task.model.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    changed = {key for key, value in state.items() if not torch.equal(value, before[key])}
    image = config.model.image
    assert any(key.startswith("text.") for key in changed)
    assert any(key.startswith("image_encoder.backbone") for key in changed) == (image.trainable_blocks != 0)
    if config.task == "pretraining":
        wanted = ("contrastive", "matching", "masked_language", "captioning", "answering", "self_critical")
        assert set(losses) == {key for key in wanted if getattr(config.objectives, key) > 0}
    assert 0 < schedule(config.optimizer, 1000, 100)(0) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"pretrain/{name}" for name in RECIPES] + FINETUNING)
def test_a_step_in_full_size(name: str) -> None:
    config = offline(load_config(FOLDER.parent / f"{name}.yaml"))
    losses = step(config, 2, config.model.image.image_size or 224)
    # An answer's loss is the sum of its tokens', each log(30,522) at the start.
    words = config.data.max_answer_tokens if config.task == "vqa" else 1
    assert all(0 <= value < 20 * words for value in losses.values())
