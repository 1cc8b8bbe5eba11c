"""Every setting of fine-tuning is found again in what is built: objectives, adapters, and the optimizer's groups."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vlm.build import build_parts, build_task
from vlm.config import AdversarialConfig, FinetuneConfig, LowRankConfig, OptimizerConfig
from vlm.data.index import load_index
from vlm.data.synthetic import write_scenes
from vlm.finetune import rate_factors
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.adversarial import Adversarial
from vlm.objectives.captioning import Captioning
from vlm.objectives.consistency import Consistency
from vlm.objectives.contrastive import Contrastive
from vlm.objectives.distillation import Distillation
from vlm.objectives.sigmoid import SigmoidContrastive
from vlm.settings import config_from_dict
from vlm.settings_check import check
from vlm.tasks.task import Task
from vlm.train.optimizer import build_optimizer

Checkpoint = Callable[..., Path]
# No two alike and none the default, so that none can stand for another.
GIVEN: dict[str, Any] = {
    "contrastive": 0.31,
    "consistency": 0.73,
    "adversarial": {"steps": 2, "step_size": 0.017, "bound": 0.29},
    "teacher_logits": 0.41,
    "teacher_features": 0.59,
    "teacher_temperature": 3.7,
    "low_rank": {"rank": 3, "alpha": 5.0, "targets": ["qkv", "query"]},
}
MODEL = {
    "image": {"name": "test_vit", "image_size": 32},
    "text": {"dim": 32, "heads": 2, "layers": 2, "cross_attention": [0, 1], "dropout": 0.1, "attention_dropout": 0.0},
}


@pytest.fixture
def build(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Task]:
    """build(finetune={...}, ...): the task of a captioner that is fine-tuned with these sections."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def make(**sections: Any) -> Task:
        write_scenes(tmp_path / "scenes", 4, 1, size=32)
        sets = [load_index(tmp_path / "scenes/train")]
        data = {"splits": {"train": [sets[0].root]}, "batch_size": 4}
        values = {"task": "captioning", "model": MODEL, "data": data, "init_from": str(checkpoint())}
        config = config_from_dict(values | {"out": str(tmp_path / "run")} | sections, "test")
        check(config)
        parts = build_parts(config, sets)
        return build_task(parts.config, parts, sets=sets)

    return make


def found_again(task: Task, teacher: str) -> dict[str, Any]:
    """The settings of `finetune`, read back from what they built."""
    around: Any = task.objectives["captioning"]
    assert [type(around), type(around.inner), type(around.inner.inner), type(around.inner.inner.inner)] == [
        Adversarial,
        Consistency,
        Distillation,
        Captioning,
    ]
    taught: Distillation = around.inner.inner
    adapters = {name: m for name, m in task.model.named_modules() if hasattr(m, "get_delta_weight")}
    one: Any = next(iter(adapters.values()))
    (rank,) = {m.r["default"] for m in adapters.values()}  # type: ignore[index, union-attr]
    (scale,) = {m.scaling["default"] for m in adapters.values()}  # type: ignore[index, union-attr]
    factors = [one.lora_B["default"].weight, one.lora_A["default"].weight]
    nn.init.normal_(factors[0])
    torch.testing.assert_close(one.get_delta_weight("default"), scale * factors[0] @ factors[1])
    return {
        "contrastive": task.weights["contrastive"],
        "consistency": around.inner.alpha,
        "adversarial": {"steps": around.steps, "step_size": around.step_size, "bound": around.bound},
        "teacher": teacher if taught._teacher[0].config.text.dim == 48 else None,
        "teacher_logits": taught.logits,
        "teacher_features": taught.features,
        "teacher_temperature": taught.temperature,
        "low_rank": {
            "rank": rank,
            "alpha": scale * rank,
            "targets": sorted({name.split(".")[-1] for name in adapters}),
        },
    }


def test_every_setting_is_found_again(build: Callable[..., Task], checkpoint: Checkpoint) -> None:
    pytest.importorskip("peft")
    teacher = str(checkpoint(text={"dim": 48, "heads": 4}))
    given = GIVEN | {"teacher": teacher}
    assert set(given) == {field.name for field in fields(FinetuneConfig)}, "a new setting has to be read back, too"
    assert set(given["adversarial"]) == {field.name for field in fields(AdversarialConfig)}
    assert set(given["low_rank"]) == {field.name for field in fields(LowRankConfig)}
    assert found_again(build(finetune=given), teacher) == given


@pytest.mark.parametrize(("form", "kind"), [("softmax", Contrastive), ("sigmoid", SigmoidContrastive)])
def test_the_contrast_that_is_kept_on_has_the_form_that_is_asked_for(
    build: Callable[..., Task], form: str, kind: type
) -> None:
    task = build(finetune={"contrastive": 0.5}, objectives={"contrastive_loss": form})
    assert type(task.objectives["contrastive"]) is kind
    assert task.weights["contrastive"] == 0.5


def rates(task: Task, config: OptimizerConfig) -> dict[str, float]:
    """By parameter the factor of the group that the optimizer has it in."""
    names = {id(p): name for name, p in (*task.model.named_parameters(), *task.learned.named_parameters())}
    groups = build_optimizer(task.model, config, task.learned, task.rate_factors).param_groups
    found = [(names[id(p)], group["factor"]) for group in groups for p in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_what_the_objectives_have_of_their_own_is_new(build: Callable[..., Task], checkpoint: Checkpoint) -> None:
    """The sigmoid's bias and the map to a wider teacher, whatever the start brought."""
    optimizer = {"new_lr_factor": 10.0, "lr": 1e-3}
    finetune = {"contrastive": 0.5, "teacher": str(checkpoint(text={"dim": 48, "heads": 4})), "teacher_features": 1.0}
    task = build(finetune=finetune, optimizer=optimizer, objectives={"contrastive_loss": "sigmoid"})
    own = {name for name, _ in task.learned.named_parameters()}
    assert {name.split(".")[0] for name in own} == {"contrastive", "captioning"}
    found = rates(task, config_from_dict({"optimizer": optimizer}, "test").optimizer)
    assert {name for name, factor in found.items() if factor == 10} == own
    assert {factor for name, factor in found.items() if name not in own} == {1.0}


def test_new_parts_have_both_factors(build: Callable[..., Task]) -> None:
    """Of a decoder whose first layer is new: the decay of its depth, and the factor of what is new."""
    optimizer = {"new_lr_factor": 10.0, "layer_decay": 0.5, "lr": 1e-3}
    task = build(model=MODEL | {"decoder": "separate", "decoder_layers": 3}, optimizer=optimizer)
    found = rates(task, config_from_dict({"optimizer": optimizer}, "test").optimizer)
    assert found["decoder.layers.0.self_norm.weight"] == pytest.approx(10 * 0.5**3)
    assert found["decoder_memory.keys.0.weight"] == pytest.approx(10 * 0.5**3)
    assert found["decoder.layers.1.self_norm.weight"] == pytest.approx(0.5**2)
    assert found["decoder.layers.2.self_norm.weight"] == pytest.approx(0.5)
    assert found["text.embeddings.word.weight"] == pytest.approx(0.5**3)


def test_factors_multiply(tiny_model: Callable[..., VisionLanguageModel]) -> None:
    model, learned = tiny_model(), nn.ModuleDict({"objective": nn.Linear(2, 2)})
    names = [name for name, _ in model.named_parameters()]
    new = {"text.layers.3.self_norm.weight", "temperature"}
    found = rate_factors(model, learned, OptimizerConfig(layer_decay=0.5, new_lr_factor=3.0), new)
    assert found["text.layers.3.self_norm.weight"] == pytest.approx(0.5 * 3)
    assert found["text.layers.2.self_norm.weight"] == pytest.approx(0.25)
    assert found["temperature"] == found["objective.weight"] == found["objective.bias"] == 3.0
    assert set(found) <= {*names, "objective.weight", "objective.bias"}
    assert rate_factors(model, learned, OptimizerConfig(), new) == {}
