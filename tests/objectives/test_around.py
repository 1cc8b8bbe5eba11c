"""R-Drop, FreeLB and distillation against their definitions, worked out beside them, and laid around each other."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.config import ModelConfig
from vlm.data.batch import Batch
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.adversarial import Adversarial, Shift
from vlm.objectives.captioning import Captioning
from vlm.objectives.consistency import Consistency
from vlm.objectives.distillation import Distillation
from vlm.tasks.task import Task

MakeModel = Callable[..., VisionLanguageModel]


def task_of(model: VisionLanguageModel, objective: Any) -> Task:
    return Task(model, {"captioning": objective}, {"captioning": 1.0}).double().train()


def data() -> Batch:
    """Five texts of four images, of different lengths and prompts; one without weight, one of half."""
    batch = Batch.fake(4, length=8)
    rows = torch.tensor([0, 1, 2, 2, 3])
    texts = batch.texts._map(lambda part: part[rows])
    weight = torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0])
    return replace(batch, texts=replace(texts, weight=weight, prompt=torch.tensor([1, 1, 2, 1, 1])))


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(
        loss, list(model.parameters()), allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return dict(zip((name for name, _ in model.named_parameters()), found, strict=True))


def said(model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (N, V), labels and weights at every label, by loops."""
    rows, labels, weights = [], [], []
    texts = batch.texts
    memory = model.memory(model.encode_image(batch.images).tokens, None, "decoder")
    for t in range(len(texts.ids)):
        logits = model.decode(texts.ids[t : t + 1], memory.select(texts.image[t : t + 1]))[0]
        for i in range(int(texts.prompt[t]), int(texts.mask[t].sum())):
            if texts.weight[t] > 0:
                rows.append(logits[i - 1])
                labels.append(texts.ids[t, i])
                weights.append(texts.weight[t])
    return torch.stack(rows), torch.stack(labels), torch.stack(weights)


def test_without_dropout_both_passes_agree(tiny_model: MakeModel) -> None:
    batch, plain = data(), Captioning(0.1)
    model = tiny_model()
    alone, both = (task_of(model, o)(batch)["captioning"] for o in (plain, Consistency(plain, 5.0)))
    torch.testing.assert_close(both.sum, alone.sum)
    assert both.count == alone.count
    assert both.scalars["divergence"][0].abs() < 1e-12
    for name, value in gradients(model, both.sum).items():
        torch.testing.assert_close(value, gradients(model, alone.sum)[name], msg=name)


def test_with_dropout_the_divergence_is_the_symmetric_one(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, plain = data(), Captioning(0.1)
    model = tiny_model(text={"dropout": 0.3})
    kept: list[list[Tensor]] = []
    run = Task._run

    def keeping(self: Task, *arguments: Any) -> list[Tensor]:
        kept.append(run(self, *arguments))
        return kept[-1]

    monkeypatch.setattr(Task, "_run", keeping)
    torch.manual_seed(0)
    loss = task_of(model, Consistency(plain, 2.0))(batch)["captioning"]
    one, two = (plain.predictions(model, states, batch) for states in kept[0])
    p, q = one.logits.softmax(1), two.logits.softmax(1)
    kl = ((p - q) * (p.log() - q.log())).sum(1)  # KL(p, q) + KL(q, p)
    assert float((kl * one.weight).sum().detach()) > 0.1
    ce = [F.cross_entropy(x.logits, x.labels, reduction="none", label_smoothing=0.1) for x in (one, two)]
    want = ((ce[0] + ce[1]) / 2 + 2.0 / 4 * kl) * one.weight
    torch.testing.assert_close(loss.sum, want.sum())
    torch.testing.assert_close(loss.scalars["divergence"][0], (kl * one.weight).sum().detach() / 2)
    assert loss.scalars["accuracy"][1] == 2 * len(one.labels)


def test_a_teacher_like_the_student_has_nothing_to_teach(tiny_model: MakeModel) -> None:
    batch, plain = data(), Captioning(0.1)
    model = tiny_model()
    around = Distillation(plain, copy.deepcopy(model), 32, 1.0, 1.0)
    assert around.projection is None
    loss, alone = (task_of(model, o)(batch)["captioning"] for o in (around, plain))
    torch.testing.assert_close(loss.sum, alone.sum)
    for name in ("teacher_logits", "teacher_features"):
        assert loss.scalars[name][0].abs() < 1e-12


def test_distillation_is_hinton_s_at_every_label(
    tiny_model: MakeModel, tiny_config: Callable[..., ModelConfig]
) -> None:
    batch, plain = data(), Captioning(0.1)
    model = tiny_model()
    torch.manual_seed(3)
    larger = VisionLanguageModel(
        tiny_config(text={"dim": 48, "heads": 4, "dropout": 0.5}, image="test_resnet")
    ).double()
    around = Distillation(plain, larger, 32, logits=0.7, features=0.3, temperature=3.0)
    task = task_of(model, around)
    assert not larger.training
    loss, alone = task(batch)["captioning"], task_of(model, plain)(batch)["captioning"]
    student, _, weight = said(model, batch)
    teacher, _, _ = said(larger, batch)
    kl = F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="none").sum(1) * 9
    torch.testing.assert_close(loss.scalars["teacher_logits"][0], (kl * weight).sum().detach())
    apart = float(loss.scalars["teacher_features"][0])
    assert float(loss.sum) == pytest.approx(float(alone.sum) + 0.7 * float((kl * weight).sum()) + 0.3 * apart)
    # trained beside the model, but neither the teacher nor its weights are part of anything that is kept
    assert {name for name, _ in task.learned.named_parameters()} == {
        "captioning.projection.weight",
        "captioning.projection.bias",
    }
    assert set(task.training_state()) == {f"learned.captioning.projection.{name}" for name in ("weight", "bias")}
    loss.sum.backward()
    assert around.projection is not None
    assert around.projection.weight.grad is not None
    assert all(p.grad is None for p in larger.parameters())
    task.float()
    assert larger.temperature.dtype == torch.float32, "it moves with the task"
    task.train()
    assert not larger.training


def test_the_teacher_sees_images_of_its_own_size(tiny_model: MakeModel) -> None:
    batch, larger = data(), tiny_model()
    larger.image_encoder.resize(64)
    loss = task_of(tiny_model(), Distillation(Captioning(), larger, 32))(batch)["captioning"]
    assert loss.sum.isfinite()


def free_lb(model: VisionLanguageModel, batch: Batch, words: Shift, image: Shift, steps: int) -> dict[str, Tensor]:
    """The authors' loop: gradients of the weights are gathered place by place, 1 / K of each."""
    texts, plain = batch.texts, Captioning(0.1)
    gathered: dict[str, Tensor] = {}
    delta = [words.by.detach().clone(), image.by.detach().clone()]
    for _ in range(steps):
        moved = [d.requires_grad_() for d in delta]
        tokens = model.encode_image(batch.images).tokens + moved[1]
        memory = model.memory(tokens, None, "decoder").select(texts.image)
        states = model.text(model.text.embed(texts.ids, 0, moved[0]), None, memory, causal=True)
        loss = plain.judge(model, plain.predictions(model, states, batch), None, batch).sum  # type: ignore[arg-type]
        for name, value in gradients(model, loss).items():
            gathered[name] = gathered.get(name, torch.zeros_like(value)) + value / steps
        found = torch.autograd.grad(loss, moved)
        new = []
        for d, g, shift in zip(moved, found, (words, image), strict=True):
            rows = []
            for r in range(len(d)):
                step = d[r].detach() + shift.step[r] * g[r] / max(float(g[r].norm()), 1e-300)
                rows.append(step * min(1.0, float(shift.limit[r]) / max(float(step.norm()), 1e-300)))
            new.append(torch.stack(rows))
        delta = new
    return gathered


def test_adversarial_gradients_are_free_lb_s(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = data(), tiny_model()
    around = Adversarial(Captioning(0.1), steps=3, step_size=0.05, bound=0.08)
    task = task_of(model, around)
    starts: list[tuple[Shift, Shift]] = []
    begin = Adversarial._start

    def keeping(self: Adversarial, *arguments: Any) -> tuple[Shift, Shift]:
        starts.append(begin(self, *arguments))
        return starts[-1]

    monkeypatch.setattr(Adversarial, "_start", keeping)
    loss = task(batch)["captioning"]
    words, image = starts[0]
    found = gradients(model, loss.sum)
    for name, want in free_lb(model, batch, words, image, 3).items():
        torch.testing.assert_close(found[name], want, msg=name)
    assert all(p.grad is None for p in model.parameters()), "the ascent leaves no gradients behind"
    # the start: within the bound, and nothing at padding
    texts = batch.texts
    embedded = model.text.word_embedding.detach()[texts.ids] * texts.mask[..., None]
    torch.testing.assert_close(words.limit.flatten(), 0.08 * embedded.norm(dim=(1, 2)))
    assert (words.by.norm(dim=(1, 2)) <= words.limit.flatten()).all()
    assert (words.by[~texts.mask] == 0).all()
    assert (words.by[texts.mask] != 0).all()


def test_the_loss_climbs_within_the_bound() -> None:
    torch.manual_seed(0)
    states, where = torch.randn(3, 4, 5), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    goal = torch.randn(3, 4, 5)
    shift = Shift.drawn(states, where, bound=0.2, step=0.1)
    values = []
    for _ in range(60):
        values.append(float((shift.by * goal).sum()))
        shift = shift.climbed(torch.autograd.grad((shift.by * goal).sum(), shift.by)[0])
        length = shift.by.norm(dim=(1, 2))
        assert (length <= shift.limit.flatten() * 1.0001).all()
        assert (shift.by[~where] == 0).all()
    assert all(after > before - 1e-5 for before, after in itertools.pairwise(values))
    torch.testing.assert_close(length, shift.limit.flatten())  # a linear loss ends at the bound, along its gradient
    masked = goal * where[..., None]
    torch.testing.assert_close(shift.by.detach(), masked / masked.norm(dim=(1, 2), keepdim=True) * shift.limit)


@pytest.mark.parametrize("settings", [{}, {"checkpointing": True}])
def test_all_around_each_other_and_the_same_again_from_the_seed(
    tiny_model: MakeModel, settings: dict[str, Any]
) -> None:
    batch = data()
    model = tiny_model(text={"dropout": 0.2, **settings})
    teacher = copy.deepcopy(tiny_model()).requires_grad_(False)
    inner = Distillation(Captioning(0.1), teacher, 32, 1.0, 0.5)
    task = task_of(model, Adversarial(Consistency(inner, 1.0), 2, 0.05, 0.1))
    asked = 0
    encode = teacher.encode_image

    def counting(images: Tensor) -> Any:
        nonlocal asked
        asked += 1
        return encode(images)

    teacher.encode_image = counting  # type: ignore[method-assign]
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loss = task(batch)["captioning"]
        found.append((loss.sum.detach(), gradients(model, loss.sum), torch.rand(1)))
    assert asked == 1, "the teacher says it once a batch"
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    assert torch.equal(found[0][2], found[1][2])
    assert not torch.equal(found[0][0], found[2][0])
    assert set(loss.scalars) == {"accuracy", "divergence", "teacher_logits", "teacher_features"}


def test_a_batch_without_texts_to_learn_gives_a_zero(tiny_model: MakeModel) -> None:
    batch = replace(data(), captions=torch.tensor([0, 1, 2, 3, 4]), questions=torch.tensor([], dtype=torch.long))
    model = tiny_model(text={"dropout": 0.1})
    plain = Captioning(0.1, of="answers")
    teacher = copy.deepcopy(model)
    for around in (Consistency(plain, 1.0), Distillation(plain, teacher, 32), Adversarial(plain, 2, 0.1, 0.1)):
        loss = task_of(model, around)(batch)["captioning"]
        assert (float(loss.sum), float(loss.count)) == (0, 0)
        loss.sum.backward()
