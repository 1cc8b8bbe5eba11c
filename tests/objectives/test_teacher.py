"""The momentum teacher: its average, its mode, what it says, what becomes keys; and that a run goes on with it as if it had never stopped."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile

from vlm.config import ModelConfig, ObjectivesConfig
from vlm.data.batch import Batch
from vlm.errors import ConfigError
from vlm.model import lengths
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives import pairs
from vlm.objectives.teacher import Teacher
from vlm.settings import config_from_dict
from vlm.settings_check import check
from vlm.tasks.pretraining import Pretraining

TAUGHT = ObjectivesConfig(matching=0.0, momentum=0.9, queue=6, alpha=0.4, alpha_ramp=0.0)
LATE: dict[str, Any] = {"fusion": "late", "text": {"cross_attention": (2, 3)}}
TinyModel = Callable[..., VisionLanguageModel]


def descend(task: Pretraining, batch: Batch, rate: float = 0.05) -> dict[str, Tensor]:
    """One step of plain gradient descent on all losses; the losses before it."""
    losses = {name: loss.sum / loss.count for name, loss in task(batch).items()}
    task.zero_grad()
    sum(task.weights[name] * loss for name, loss in losses.items()).backward()  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    task.after_step()
    return {name: loss.detach() for name, loss in losses.items()}


def batches(count: int) -> list[Batch]:
    made = [Batch.fake(masked=True, seed=seed) for seed in range(count)]
    return [replace(b, image_ids=b.image_ids + 3 * n) for n, b in enumerate(made)]  # neighbours share an image


def test_it_is_the_average_of_the_formula_and_copies_buffers(tiny_config: Callable[..., ModelConfig]) -> None:
    torch.manual_seed(0)
    model = VisionLanguageModel(tiny_config(image="test_resnet")).double()  # batch norm with statistics of its own
    teacher = Teacher(model, momentum=0.995)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
            for buffer in model.buffers():
                buffer += 1
        teacher.update(model)
        expected = {
            n: 0.995 * e + 0.005 * p.detach()
            for (n, p), e in zip(model.named_parameters(), expected.values(), strict=True)
        }
    for name, parameter in teacher.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-12)
        assert not parameter.requires_grad
    buffers = dict(model.named_buffers())
    assert any("running_mean" in name for name in buffers)
    for name, buffer in teacher.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_it_stays_in_evaluation_mode_and_without_gradients(
    tiny_config: Callable[..., ModelConfig], batch: Batch
) -> None:
    config = tiny_config(text={"dropout": 0.5, "attention_dropout": 0.5})
    task = Pretraining(VisionLanguageModel(config), TAUGHT).train()
    assert task.teacher is not None
    assert task.model.training
    assert not any(module.training for module in task.teacher.modules())
    first, second = (task.features(batch).teacher for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first.keys[0].text, second.keys[0].text)
    assert first.words is not None
    assert second.words is not None
    assert torch.equal(first.words, second.words)
    sum(loss.sum for loss in task(batch).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in task.teacher.parameters())
    assert {id(p) for p in task.teacher.parameters()}.isdisjoint({id(p) for p in task.model.parameters()})


def test_at_first_it_says_what_the_model_says(tiny_model: TinyModel) -> None:
    """Of texts that are two an image, in no order."""
    batch = Batch.fake(3, texts_per_image=2, masked=True)
    batch = replace(batch, texts=replace(batch.texts, image=torch.tensor([2, 0, 1, 1, 0, 2])))
    for settings in ({}, LATE):
        task = Pretraining(tiny_model(**settings), TAUGHT)
        features = task.features(batch)
        taught = features.teacher
        assert taught is not None
        assert taught.pairs is not None
        assert taught.words is not None
        assert batch.masked is not None
        torch.testing.assert_close(taught.pairs.text, features.texts["plain"].embedding, rtol=0, atol=1e-12)
        own = features.image.embedding[batch.texts.image]
        torch.testing.assert_close(taught.pairs.image, own, rtol=0, atol=1e-12)
        states = task._run(list(task.objectives["masked_language"].requests(task.model, features, batch)), features)
        logits = task.model.masked_language_logits(states[0].flatten(0, 1)[batch.masked.positions])
        torch.testing.assert_close(taught.words, logits, rtol=0, atol=1e-10)


def test_the_losses_are_those_of_the_formula_with_a_queue(tiny_model: TinyModel) -> None:
    """Third step: the queue has wrapped, and holds two captions of images that the batch holds as well."""
    task = Pretraining(tiny_model(), TAUGHT).train()
    assert task.teacher is not None
    first, second, third = batches(3)
    descend(task, first)
    descend(task, second)
    student, teacher, queue = task.model, task.teacher.model, task.teacher.queue
    assert queue is not None
    ids = torch.cat([third.image_ids, queue.ids[:-1]])
    assert sorted(queue.ids[:-1].tolist()) == [3, 4, 4, 5, 6, 7]  # of 1 2 3 4, 4 5 6 7 the last six
    same = (third.image_ids[:, None] == ids).double()
    assert same.sum() == 5  # image 7 stands in the queue too
    with torch.no_grad():
        text_m = teacher.encode_text(third.texts.ids, third.texts.mask).embedding
        text = student.encode_text(third.texts.ids, third.texts.mask).embedding
        image_m, image = teacher.encode_image(third.images).embedding, student.encode_image(third.images).embedding
        assert text is not None
        assert text_m is not None
    total = torch.zeros((), dtype=torch.float64)
    for own, own_m, keys in (
        (image, image_m, torch.cat([text_m, queue.text[:-1]])),
        (text, text_m, torch.cat([image_m, queue.image[:-1]])),
    ):
        soft = (own_m @ keys.T / student.temperature).softmax(1).detach()
        target = 0.4 * soft + 0.6 * same / same.sum(1, keepdim=True)
        total = total - (target * (own @ keys.T / student.temperature).log_softmax(1)).sum(1).mean() / 2
    loss = task(third)["contrastive"]
    torch.testing.assert_close(loss.sum / loss.count, total, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(value, student.temperature)[0] for value in (loss.sum / loss.count, total)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-10)


def test_slots_that_nothing_was_written_to_never_count(tiny_model: TinyModel, batch: Batch) -> None:
    with_queue, without = (Pretraining(tiny_model(), replace(TAUGHT, queue=size)) for size in (500, 0))
    for name, loss in with_queue(batch).items():
        torch.testing.assert_close(loss.sum, without(batch)[name].sum, rtol=0, atol=1e-12)


def test_a_batch_of_bad_samples_leaves_no_mark(tiny_model: TinyModel, batch: Batch) -> None:
    task = Pretraining(tiny_model(), TAUGHT).train()
    assert task.teacher is not None
    bad = replace(batch, texts=replace(batch.texts, weight=torch.zeros(4)))
    losses = task(bad)
    sum(loss.sum for loss in losses.values()).backward()  # type: ignore[union-attr]
    assert all(loss.sum == 0 and loss.count == 0 for loss in losses.values())
    assert all(not p.grad.any() for p in task.model.parameters() if p.grad is not None)  # nor a NaN
    task.after_step()
    assert task.teacher.queue is not None
    assert task.teacher.queue.pushed == 0


def test_features_enter_the_queue_after_the_step_and_in_training_only(tiny_model: TinyModel, batch: Batch) -> None:
    task = Pretraining(tiny_model(), TAUGHT)
    assert task.teacher is not None
    queue = task.teacher.queue
    assert queue is not None
    task.eval()
    task(batch)
    task.after_step()
    assert queue.pushed == 0
    task.train()
    task(batch)
    task(batch)  # two micro-batches
    assert queue.pushed == 0
    task.after_step()
    assert queue.pushed == 8


@pytest.mark.parametrize(("keys", "columns"), [("joined", 12), ("local", 4)])
def test_the_queue_takes_all_ranks_features_and_keys_are_as_set(
    tiny_model: TinyModel, batch: Batch, monkeypatch: pytest.MonkeyPatch, keys: Any, columns: int
) -> None:
    """Three ranks, of which the others hold the same."""
    monkeypatch.setattr(pairs, "gather", lambda part: torch.cat([part] * 3))
    task = Pretraining(tiny_model(), replace(TAUGHT, queue=20, keys=keys)).train()
    assert task.teacher is not None
    taught = task.features(batch).teacher
    assert taught is not None
    assert [len(block.text) for block in taught.keys] == [columns, 20]
    task.after_step()
    assert task.teacher.queue is not None
    assert task.teacher.queue.pushed == 12


def test_alpha_grows_linearly_with_the_steps(tiny_model: TinyModel) -> None:
    model = tiny_model()
    teacher = Teacher(model, alpha=0.4, ramp=2.0)
    teacher.prepare(epoch_steps=5)
    found = []
    for _ in range(13):
        found.append(float(teacher.weight))
        teacher.update(model)
    assert found == pytest.approx([0.4 * min(step / 10, 1) for step in range(13)])
    assert float(Teacher(model, alpha=0.3, ramp=0.0).weight) == pytest.approx(0.3)


def test_alpha_0_gives_hard_targets(tiny_model: TinyModel, batch: Batch) -> None:
    task = Pretraining(tiny_model(), replace(TAUGHT, alpha=0.0, queue=0))
    plain = Pretraining(tiny_model(), replace(TAUGHT, momentum=0.0, queue=0))
    for name, loss in task(batch).items():  # before the first step teacher and model are one
        torch.testing.assert_close(loss.sum, plain(batch)[name].sum, rtol=0, atol=1e-12)


def test_the_state_brings_it_back(tiny_model: TinyModel) -> None:
    straight = Pretraining(tiny_model(), replace(TAUGHT, alpha_ramp=1.0)).train()
    straight.prepare(6)
    data = batches(5)
    for b in data[:3]:
        descend(straight, b)
    resumed = Pretraining(tiny_model(), replace(TAUGHT, alpha_ramp=1.0)).train()
    resumed.prepare(6)
    resumed.model.load_state_dict(straight.model.state_dict())
    resumed.load_training_state(copy.deepcopy(straight.training_state()))
    for b in data[3:]:
        losses, expected = descend(resumed, b), descend(straight, b)
        assert all(torch.equal(losses[name], expected[name]) for name in expected)
    state, expected_state = resumed.training_state(), straight.training_state()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(value, expected_state[name]) for name, value in state.items())
    with pytest.raises(ValueError, match=r"of other settings, .* such as teacher\.model"):
        Pretraining(tiny_model(), replace(TAUGHT, momentum=0.0, queue=0)).load_training_state(state)
    with pytest.raises(RuntimeError, match="queue"):
        Pretraining(tiny_model(), replace(TAUGHT, queue=9)).load_training_state(state)


def test_nothing_waits_for_the_device(tiny_model: TinyModel, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "reads_lengths", lambda _: False)  # as on a GPU
    task = Pretraining(tiny_model(), TAUGHT).train()
    task(batch)
    task.after_step()
    with profile() as profiled:
        losses = task(batch)
        sum(loss.sum for loss in losses.values()).backward()  # type: ignore[union-attr]
        task.after_step()
    used = {event.name for event in profiled.events()}
    assert {"aten::_foreach_lerp_", "aten::index_copy_"} <= used
    assert not used & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}


def test_similarities_stay_in_fp32_under_autocast(tiny_config: Callable[..., ModelConfig], batch: Batch) -> None:
    torch.manual_seed(0)
    task = Pretraining(VisionLanguageModel(tiny_config()), TAUGHT).train()
    task(batch)
    task.after_step()
    seen: list[torch.dtype] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.softmax, torch.log_softmax, F.cross_entropy):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16):
        features = task.features(batch)
        assert features.teacher is not None
        assert features.teacher.words is not None
        assert features.teacher.words.dtype == torch.bfloat16  # else nothing was to be shown
        objective = task.objectives["masked_language"]
        outputs = task._run(list(objective.requests(task.model, features, batch)), features)
        with Watch():
            losses = {
                "contrastive": task.objectives["contrastive"].loss(task.model, (), features, batch),
                "masked_language": objective.loss(task.model, outputs, features, batch),
            }
    assert len(seen) == 7  # two ways, each softmax and log softmax; the predictions, hard and soft
    assert set(seen) == {torch.float32}
    assert all(loss.sum.isfinite() for loss in losses.values())


def test_a_task_that_compares_nothing_has_a_teacher_of_words_only(tiny_model: TinyModel, batch: Batch) -> None:
    calls: list[str] = []
    task = Pretraining(tiny_model(), replace(TAUGHT, contrastive=0.0, queue=0))
    assert task.teacher is not None

    def note(module: nn.Module, *_: Any) -> None:
        calls.append("projection")

    task.teacher.model.text_projection.register_forward_hook(note)
    losses = task(batch)
    assert list(losses) == ["masked_language"]
    assert calls == []
    words = Pretraining(tiny_model(), replace(TAUGHT, masked_language=0.0))
    taught = words.features(batch).teacher
    assert taught is not None
    assert taught.words is None


@pytest.fixture
def refused() -> Callable[[dict[str, Any]], str]:
    def run(objectives: dict[str, Any]) -> str:
        with pytest.raises(ConfigError) as caught:
            check(config_from_dict({"objectives": objectives}, "test"))
        return str(caught.value)

    return run


def test_settings_that_cannot_be_meant_are_refused(refused: Callable[[dict[str, Any]], str]) -> None:
    assert refused({"queue": 64}).startswith("objectives.queue=64 holds a momentum teacher's features")
    assert refused({"momentum": 1.0}).startswith("objectives.momentum=1.0; expected 0 (off) to below 1")
    assert refused({"momentum": 0.9, "queue": -1}).startswith("objectives.queue=-1")
    assert refused({"momentum": 0.9, "alpha": 1.5}).startswith("objectives.alpha=1.5; expected a share")
