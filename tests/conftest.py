"""Shared by all tests: one thread, and the smallest model that has every part."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.config import ImageConfig, ModelConfig, TextConfig
from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Faster for shapes as small as these, and equal sums everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _config(text: dict[str, Any] | None = None, image: str = "test_vit", **settings: Any) -> ModelConfig:
    small: dict[str, Any] = {
        "vocab_size": 64,
        "dim": 32,
        "heads": 2,
        "layers": 4,
        "feed_forward_dim": 64,
        "max_positions": 64,
    }
    quiet: dict[str, Any] = {"cross_attention": (0, 1, 2, 3), "dropout": 0.0, "attention_dropout": 0.0}
    encoder = ImageConfig(name=image, image_size=32)
    return ModelConfig(
        image=encoder, text=TextConfig(**(small | quiet | (text or {}))), **({"embed_dim": 16} | settings)
    )


@pytest.fixture
def tiny_config() -> Callable[..., ModelConfig]:
    """tiny_config(text={...}, image="test_vit", **settings): four layers of width 32, all with cross-attention, images of 32 px, no dropout."""
    return _config


@pytest.fixture
def tiny_model() -> Callable[..., VisionLanguageModel]:
    """tiny_model(text={...}, **settings): as `tiny_config`, in fp64 and evaluation mode, its weights wide enough that a slip shows."""

    def make(text: dict[str, Any] | None = None, **settings: Any) -> VisionLanguageModel:
        torch.manual_seed(0)
        model = VisionLanguageModel(_config(text, **settings)).double().eval()
        for name, parameter in model.named_parameters():
            if not name.startswith(("image_encoder.backbone", "temperature")):
                torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.3)
        return model

    return make


@pytest.fixture
def batch() -> Batch:
    """Four images with a text each, of different lengths, with answers and masked tokens."""
    return Batch.fake(answers=True, masked=True)


SCENES = (
    "a red circle left of a blue square",
    "two dogs run on the green grass",
    "a man with a hat rides a brown horse",
    "what color is the small circle",
    "how many objects are there in the picture",
    "question: answer: yes no three black-and-white",
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(task="captioning", answers=(), prompt="", **model settings): the folder of a tiny random model of fp32, made once.

    Its vocabulary is that of SCENES, its images are of 32 px; what it says depends on the image.
    """
    made: dict[str, Path] = {}

    def make(task: str = "captioning", answers: tuple[str, ...] = (), prompt: str = "", **settings: Any) -> Path:
        name = repr((task, answers, prompt, settings))
        if name not in made:
            made[name] = tmp_path_factory.mktemp("checkpoint") / task
            _write_random(made[name], task, answers, prompt, settings)
        return made[name]

    return make


def _write_random(folder: Path, task: Any, answers: tuple[str, ...], prompt: str, settings: dict[str, Any]) -> None:
    from vlm.checkpoint import write_checkpoint
    from vlm.config import Config, DataConfig, GenerationConfig, VqaConfig
    from vlm.data.text import train_wordpiece

    tokenizer = train_wordpiece(SCENES * 2, 200)
    shape = {"vocab_size": tokenizer.vocab_size, "max_positions": 48, "layers": 2, "cross_attention": (0, 1)}
    model_config = _config(shape | settings.pop("text", {}), **settings)
    form: Any = "encoder_decoder" if model_config.decoder_reads == "question" else "prompted"
    config = Config(
        task=task,
        out=str(folder.parent),
        model=model_config,
        data=DataConfig(prompt=prompt, max_tokens=24),
        vqa=VqaConfig(form=form, inference="rank" if answers else "generate"),
        generation=GenerationConfig(beams=2, max_length=8, min_length=2),
    )
    torch.manual_seed(1)
    model = VisionLanguageModel(model_config, load=False).eval()
    for parameter_name, parameter in model.named_parameters():
        if not parameter_name.startswith(("image_encoder.backbone", "temperature")):
            torch.nn.init.normal_(parameter, mean=1.0 if parameter_name.endswith("norm.weight") else 0.0, std=0.3)
    scores = {"scenes": {"CIDEr": 12.5}}
    write_checkpoint(folder, config, model, tokenizer.to_json(), scores, answers=list(answers) or None)
