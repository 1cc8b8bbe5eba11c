"""Fine-tuning as settings: what is trained and how fast, what is kept on, what is refused; and runs that go on as if they had never stopped."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vlm.build import Parts, build_parts, build_task, load_sets, training_loader
from vlm.config import Config
from vlm.data.synthetic import write_scenes
from vlm.errors import ConfigError, UserError
from vlm.model.pretrained import load_pretrained
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.around import Around
from vlm.run import train
from vlm.settings import config_from_dict
from vlm.settings_check import check
from vlm.tasks.task import Task
from vlm.train.distributed import Ranks
from vlm.train.optimizer import parameter_groups
from vlm.train.report import read_json_lines
from vlm.train.trainer import StoppedOnRequest

Checkpoint = Callable[..., Path]
SETTINGS: dict[str, Any] = {
    "task": "captioning",
    "model": {
        "image": {"name": "test_vit", "image_size": 32},
        "text": {
            "dim": 32,
            "heads": 2,
            "layers": 2,
            "cross_attention": [0, 1],
            "dropout": 0.1,
            "attention_dropout": 0.0,
        },
    },
    "data": {"batch_size": 4, "streams": 4, "workers": 0, "max_tokens": 24, "randaugment": None},
    "optimizer": {"lr": 1e-3, "warmup_steps": 1},
    "train": {"epochs": 2, "precision": "fp32", "log_every": 1, "evaluate_images": 4, "deterministic": True},
    "generation": {"beams": 1, "max_length": 6, "min_length": 1},
}
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 16, 8, size=32, samples_per_shard=8)
    return folder


@pytest.fixture
def make(
    scenes: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    """make({"finetune.consistency": 1}): a fine-tuning of the tiny checkpoint with these settings, checked."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def config(changes: dict[str, Any] | None = None, **top: Any) -> Config:
        splits = {"train": [f"{scenes}/train"], "val": [f"{scenes}/val"]}
        values = json.loads(json.dumps(SETTINGS | {"init_from": str(checkpoint()), "out": str(tmp_path / "run")} | top))
        values["data"]["splits"] = splits
        for key, value in (changes or {}).items():
            *path, name = key.split(".")
            section = values
            for part in path:
                section = section.setdefault(part, {})
            section[name] = value
        made = config_from_dict(values, "test")
        check(made)
        return made

    return config


def built(config: Config) -> tuple[Parts, Task]:
    sets = load_sets(config.data.splits.train, "data.splits.train")
    parts = build_parts(config, sets)
    return parts, build_task(parts.config, parts, sets=sets)


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def factors(config: Config) -> dict[str, float]:
    """The rate factor of everything that is trained."""
    _, task = built(config)
    names = {id(p): name for name, p in (*task.model.named_parameters(), *task.learned.named_parameters())}
    groups: Any = parameter_groups(task.model, config.optimizer, task.learned, task.rate_factors)
    return {names[id(p)]: group["factor"] for group in groups for p in group["params"]}


def test_a_frozen_text_encoder_keeps_its_weights_and_drops_nothing(make: Callable[..., Config]) -> None:
    config = make({"model.text.frozen": True, "train.epochs": 0.5})
    parts, _ = built(config)
    names = trained(parts.model.text)
    assert names
    assert all(".cross_attention." in name or ".cross_norm." in name for name in names)
    assert {"temperature", "language_head.bias", "fusion_memory.keys.0.weight"} <= trained(parts.model)
    parts.model.train()
    assert not parts.model.text.embeddings.dropout.training
    before = parts.model.text.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    train(config)
    after = load_pretrained(Path(config.out) / "latest")[0].text.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= names


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_the_last_text_layers(make: Callable[..., Config], kept: int) -> None:
    parts, _ = built(make({"model.text.trainable_layers": kept}))
    names = {name for name in trained(parts.model.text) if "cross" not in name}
    assert {name.split(".")[1] for name in names} == {str(i) for i in range(2 - kept, 2)}
    parts.model.train()
    assert [layer.training for layer in parts.model.text.layers] == [i >= 2 - kept for i in range(2)]
    assert parts.model.train(False).training is False


def test_more_layers_than_there_are(make: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"text\.trainable_layers=3, but there are 2 layers; use 0 to 2"):
        built(make({"model.text.trainable_layers": 3}))


def test_layer_decay_multiplies_the_parts_factors(make: Callable[..., Config]) -> None:
    found = factors(
        make({"optimizer.layer_decay": 0.5, "optimizer.lr_factors": {"image_encoder": 0.1, "text.layers.0": 3}})
    )
    assert found["language_head.bias"] == found["temperature"] == 1
    assert found["text.layers.1.self_norm.weight"] == found["fusion_memory.keys.1.weight"] == 0.5
    assert found["text.layers.0.self_norm.weight"] == 3 * 0.25
    assert found["text.embeddings.word.weight"] == 0.125
    assert found["image_encoder.backbone.blocks.5.norm1.weight"] == pytest.approx(0.1 * 0.5)
    assert found["image_encoder.backbone.pos_embed"] == pytest.approx(0.1 * 0.5**7)


def test_new_parts_have_their_own_rate(make: Callable[..., Config], checkpoint: Checkpoint) -> None:
    captioner = checkpoint(heads=("language",))
    config = make({"optimizer.new_lr_factor": 10, "finetune.contrastive": 0.5}, init_from=str(captioner))
    new = {name for name, factor in factors(config).items() if factor == 10}
    heads = {f"{side}_projection.{what}" for side in ("image", "text") for what in ("weight", "bias")}
    assert new == heads, "the contrastive head, which the captioner lacks"
    separate = {"model.decoder": "separate", "model.decoder_layers": 3, "optimizer.new_lr_factor": 10}
    new = {name for name, factor in factors(make(separate)).items() if factor == 10}
    assert {".".join(name.split(".")[:3]) for name in new} == {
        "decoder.layers.0",
        "decoder_memory.keys.0",
        "decoder_memory.values.0",
    }, "what could not be started from the two fusion layers"
    with pytest.raises(ConfigError, match=r"new_lr_factor=10, but the whole model is new"):
        built(make({"optimizer.new_lr_factor": 10}, init_from=None))


METHODS: dict[str, dict[str, Any]] = {
    "kept on, by layer and newness": {
        "finetune.contrastive": 0.3,
        "train.accumulate": 2,
        "optimizer.layer_decay": 0.7,
        "optimizer.new_lr_factor": 5,
    },
    "around the words": {
        "finetune.consistency": 1.0,
        "finetune.adversarial.steps": 2,
        "finetune.teacher_features": 0.5,
        "train.accumulate": 2,
    },
    "low rank": {"finetune.low_rank.rank": 2, "train.averaging": 0.5},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_bit_for_bit(
    make: Callable[..., Config], checkpoint: Checkpoint, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**METHODS[method], "train.epochs": 1}
    if method == "low rank":
        pytest.importorskip("peft")
    if method == "around the words":
        changes["finetune.teacher"] = str(checkpoint(text={"dim": 48, "heads": 4}))
    scores = train(make(changes, out=str(tmp_path / "whole")))["scenes"]
    assert ("mean_R@1" in scores) == ("finetune.contrastive" in changes)
    steps, after_step = 0, Task.after_step

    def after(self: Task, taken: torch.Tensor) -> None:
        nonlocal steps
        after_step(self, taken)
        steps += 1
        if steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Task, "after_step", after)
    halved = make(changes, out=str(tmp_path / "halved"))
    with pytest.raises(StoppedOnRequest):
        train(halved)
    train(halved, resume=True)
    assert steps == 4
    one, two = (load_file(tmp_path / name / "latest/model.safetensors") for name in ("whole", "halved"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    load_pretrained(tmp_path / "whole/latest")  # an ordinary checkpoint: no adapters, no teacher
    lines = read_json_lines(tmp_path / "whole/log.jsonl")
    if method == "around the words":
        assert {f"captioning/{name}" for name in ("divergence", "teacher_logits", "teacher_features")} <= set(lines[0])


def test_evaluation_takes_none_of_it(make: Callable[..., Config], checkpoint: Checkpoint) -> None:
    config = make({"finetune.teacher": "nowhere", "finetune.consistency": 1.0, "finetune.contrastive": 0.1})
    parts = build_parts(config, load_sets(config.data.splits.train, "train"))
    task = build_task(parts.config, parts)
    assert not isinstance(task.objectives["captioning"], Around)
    assert set(task.objectives) == {"captioning", "contrastive"}


def test_questions_take_what_lies_around_words(make: Callable[..., Config], checkpoint: Checkpoint) -> None:
    changes = {
        "vqa.inference": "generate",
        "finetune.consistency": 1.0,
        "finetune.adversarial.steps": 2,
        "data.max_answer_tokens": 4,
    }
    changes |= {"finetune.teacher": str(checkpoint()), "train.epochs": 0.5, "train.precision": "bf16"}
    config = make(changes, task="vqa")
    train(config)
    line = read_json_lines(Path(config.out) / "log.jsonl")[0]
    assert line["captioning/divergence"] > 0
    assert line["captioning/teacher_logits"] > 0


REFUSED = {
    "contrastive keeps on beside captioning": (
        {"finetune.contrastive": 1},
        "vqa",
        r"keeps it on beside captioning, but task=vqa",
    ),
    "no dropout": (
        {"finetune.consistency": 1, "model.text.dropout": 0},
        "captioning",
        "differ by dropout, and there is none",
    ),
    "no weights": (
        {"finetune.teacher": "x", "finetune.teacher_logits": 0},
        "captioning",
        "teacher_logits and finetune.teacher_features are 0",
    ),
    "grey": (
        {"finetune.teacher": "x", "data.blank_images": True},
        "captioning",
        "sees images that data.blank_images=True",
    ),
    "pretraining": (
        {"finetune.adversarial.steps": 1},
        "pretraining",
        "adversarial.steps are of captioning, .* task=pretraining",
    ),
    "encoder_decoder": (
        {"finetune.consistency": 1, "vqa.form": "encoder_decoder"},
        "vqa",
        "task=vqa with vqa.form=encoder_decoder; leave them out",
    ),
    "rewards alone": (
        {"finetune.consistency": 1, "objectives.self_critical": 1},
        "captioning",
        "give objectives.captioning a weight",
    ),
    "growing": ({"optimizer.layer_decay": 1.1}, "captioning", r"layer_decay=1\.1; expected a factor up to 1"),
    "adapters by layer": (
        {"finetune.low_rank.rank": 4, "optimizer.layer_decay": 0.9},
        "captioning",
        r"rank=4 trains adapters only, all at one rate",
    ),
    "adapters and an average": (
        {"finetune.low_rank.rank": 4, "objectives.momentum": 0.9},
        "pretraining",
        r"rank=4 with a momentum teacher",
    ),
    "in pieces": (
        {"finetune.adversarial.steps": 2, "train.sharding": "fsdp"},
        "captioning",
        "set train.sharding to ddp",
    ),
    "range": (
        {"finetune.adversarial.bound": 0},
        "captioning",
        r"finetune\.adversarial\.bound=0.*expected a number above 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_at_once(make: Callable[..., Config], name: str) -> None:
    changes, task, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        make(changes, task=task)


def test_a_teacher_of_other_words_is_refused(
    make: Callable[..., Config], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config = make({"finetune.teacher": str(checkpoint())}, init_from=None)
    with pytest.raises(ConfigError, match="has another tokenizer than the model"):
        built(config)
    dumb = checkpoint(heads=("contrastive",))
    with pytest.raises(ConfigError, match="does not tell words of images"):
        built(make({"finetune.teacher": str(dumb)}))


def test_adapters_alone_are_trained_and_merge_into_plain_weights(
    make: Callable[..., Config], checkpoint: Checkpoint
) -> None:
    pytest.importorskip("peft")
    from vlm.low_rank import plain_state

    captioner = checkpoint(heads=("language",))
    changes = {"finetune.low_rank.rank": 3, "finetune.contrastive": 0.1, "optimizer.new_lr_factor": 2}
    config = make(changes, init_from=str(captioner))
    parts, _ = built(config)
    model = parts.model.double()
    names = trained(model)
    adapters = {name for name in names if ".lora_" in name}
    assert names - adapters == {
        f"{side}_projection.{what}" for side in ("image", "text") for what in ("weight", "bias")
    }
    adapted = {name.split(".lora_")[0] for name in adapters}
    assert {name.split(".")[-1] for name in adapted} == {"query", "key", "value", "output", "qkv", "proj", "0", "1"}
    assert {
        "text.layers.1.cross_attention.query",
        "fusion_memory.keys.0",
        "image_encoder.backbone.blocks.2.attn.qkv",
    } <= adapted
    assert set(factors(config).values()) == {2.0}, "all that is trained is new"
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.eval()
    assert set(plain_state(model)) == set(load_file(Path(captioner) / "model.safetensors")) | {
        name for name in plain_state(model) if "_projection" in name
    }
    plain = VisionLanguageModel(model.config, load=False).double().eval()
    plain.load_state_dict(plain_state(model))
    batch = next(iter(training_loader(config, parts, load_sets(config.data.splits.train, "t"), ALONE).iterate(0)))
    with torch.no_grad():
        outputs = []
        for each in (model, plain):
            image = each.encode_image(batch.images)
            memory = each.memory(image.tokens, None, "decoder").select(batch.texts.image)
            outputs.append((image.tokens, each.decode(batch.texts.ids, memory), image.embedding))
    for one, two in zip(*outputs, strict=True):
        torch.testing.assert_close(one, two)
    scratch = load_pretrained(captioner)[0].double()
    assert not torch.allclose(scratch.encode_image(batch.images).tokens, outputs[0][0], atol=1e-2), "they do something"


def test_adapters_go_to_what_is_not_frozen(make: Callable[..., Config]) -> None:
    pytest.importorskip("peft")
    rank = {"finetune.low_rank.rank": 2}
    parts, _ = built(make({**rank, "model.image.frozen": True, "model.text.trainable_layers": 1}))
    adapted = {name.split(".lora_")[0] for name in trained(parts.model)}
    assert not any("image_encoder" in name for name in adapted)
    assert {name for name in adapted if "layers.0" in name} == {
        f"text.layers.0.cross_attention.{x}" for x in ("query", "output")
    }
    with pytest.raises(ConfigError, match=r"low_rank\.targets: no linear map is called quarry; there are .*query"):
        built(make({**rank, "finetune.low_rank.targets": ["quarry"]}))
    with pytest.raises(ConfigError, match=r"rank=2, but nothing is left to adapt"):
        built(make(rank, init_from=None))


def test_without_peft_the_extra_is_named(make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"needs peft, which is not installed; run: pip install 'vlm-fusion\[lora\]'"):
        built(make({"finetune.low_rank.rank": 2}))
