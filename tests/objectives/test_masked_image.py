"""Masked image modelling: equal to transformers' SimMIM, blind to what is hidden, helped by the text."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torchvision.transforms.functional import pil_to_tensor
from transformers import ViTConfig, ViTForMaskedImageModeling

from vlm.config import ModelConfig, ObjectivesConfig, OptimizerConfig
from vlm.data.batch import Batch
from vlm.data.synthetic import draw_scene
from vlm.errors import ConfigError
from vlm.model import lengths
from vlm.model.patches import cut, pick
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.masked_image import MaskedImage, own_text
from vlm.objectives.objective import Loss
from vlm.tasks.pretraining import Pretraining
from vlm.train.optimizer import build_optimizer, decays, named_parameters

MakeConfig = Callable[..., ModelConfig]
ALONE = ObjectivesConfig(contrastive=0.0, matching=0.0, masked_language=0.0, masked_image=1.0, masked_image_text=False)
BOTH = replace(ALONE, masked_image_text=True)


def made(config: ModelConfig, objectives: ObjectivesConfig = BOTH, size: int = 64, **image: Any) -> Pretraining:
    """A task whose images have (size / 16)² patches."""
    torch.manual_seed(0)
    encoder = replace(config.image, image_size=size, **image)
    return Pretraining(VisionLanguageModel(replace(config, image=encoder)), objectives).double().train()


def given(size: int = 64, **settings: Any) -> Batch:
    return Batch.fake(image_size=size, patches=(size // 16) ** 2, **settings)


def simmim(task: Pretraining, objective: MaskedImage) -> ViTForMaskedImageModeling:
    """transformers' model with the task's weights."""
    ours = task.model.image_encoder.backbone
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=len(ours.blocks),
        num_attention_heads=ours.blocks[0].attn.num_heads,
        intermediate_size=ours.blocks[0].mlp.fc1.out_features,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=ours.norm.eps,
        image_size=64,
        patch_size=16,
        encoder_stride=16,
    )
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    state: dict[str, Tensor] = {}
    for name, tensor in ours.state_dict().items():
        module, _, kind = name.rpartition(".")
        parts = module.split(".")
        if module.endswith("attn.qkv"):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"vit.layers.{parts[1]}.attention.{letter}_proj.{kind}"] = part
        elif parts[0] == "blocks":
            inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
            place = ".".join(parts[2:])
            state[f"vit.layers.{parts[1]}.{inner.get(place, place)}.{kind}"] = tensor
        elif name in ("cls_token", "pos_embed"):
            state[f"vit.embeddings.{'cls_token' if name == 'cls_token' else 'position_embeddings'}"] = tensor
        else:
            state[f"vit.{names[module]}.{kind}"] = tensor
    state["vit.embeddings.mask_token"] = objective.mask_token.detach()[None, None]
    # PixelShuffle's channels are (colour, row, column), ours (row, column, colour).
    for kind, tensor in objective.head.state_dict().items():
        moved = tensor.view(16, 16, 3, -1).permute(2, 0, 1, 3).reshape(tensor.shape)
        state[f"decoder.0.{kind}"] = moved[..., None, None] if kind == "weight" else moved
    theirs = ViTForMaskedImageModeling(config).double().train()
    theirs.load_state_dict(state)
    return theirs


def test_it_is_simmim_as_transformers_has_it(tiny_config: MakeConfig) -> None:
    """Loss and gradients, of the mask token as well, in fp64."""
    task = made(tiny_config(), ALONE)
    objective = task.objectives["masked_image"]
    assert isinstance(objective, MaskedImage)
    for parameter in (objective.mask_token, objective.head.bias, task.model.image_encoder.backbone.pos_embed):
        torch.nn.init.normal_(parameter)
    theirs, batch = simmim(task, objective), given()
    assert batch.hidden is not None
    pixels = task.model.image_encoder.normalize(batch.images)
    hidden = torch.zeros(4, 16, dtype=torch.bool).scatter(1, batch.hidden, True)
    expected = theirs(pixels, bool_masked_pos=hidden).loss
    loss = task(batch)["masked_image"]
    ours = loss.sum / loss.count
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    assert loss.count == objective.count(batch) == 4 * 8
    ours.backward()
    expected.backward()
    pairs = {
        "mask_token": (objective.mask_token.grad, theirs.vit.embeddings.mask_token.grad[0, 0]),
        "patches": (
            task.model.image_encoder.backbone.patch_embed.proj.weight.grad,
            theirs.vit.embeddings.patch_embeddings.projection.weight.grad,
        ),
        "norm": (task.model.image_encoder.backbone.norm.weight.grad, theirs.vit.layernorm.weight.grad),
    }
    for name, (found, wanted) in pairs.items():
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10, msg=name)


def test_every_patch_is_predicted_from_its_own_token(tiny_config: MakeConfig) -> None:
    """The error is that of the hidden patches alone, whichever they are."""
    task, batch = made(tiny_config(), ALONE), given()
    objective = task.objectives["masked_image"]
    assert isinstance(objective, MaskedImage)
    task.eval()
    with torch.no_grad():
        torch.nn.init.zeros_(objective.head.weight)
        objective.head.bias.copy_(torch.randn(768))
        pixels = task.model.image_encoder.normalize(batch.images)
        expected = 0.0
        assert batch.hidden is not None
        for image, numbers in zip(pixels, batch.hidden.tolist(), strict=True):
            for number in numbers:
                y, x = number // 4 * 16, number % 4 * 16
                square = image[:, y : y + 16, x : x + 16].permute(1, 2, 0).flatten()
                expected += float((square - objective.head.bias).abs().mean())
        assert task(batch)["masked_image"].sum.item() == pytest.approx(expected, rel=1e-12)


def test_it_reads_the_text_but_not_its_padding(tiny_config: MakeConfig) -> None:
    task, batch = made(tiny_config()).eval(), given(length=8)
    loss = task(batch)["masked_image"].sum
    assert not torch.equal(made(tiny_config(), ALONE).eval()(batch)["masked_image"].sum, loss)
    longer = batch.lengthened(16, 0)
    torch.testing.assert_close(task(longer)["masked_image"].sum, loss, rtol=0, atol=1e-10)
    ids = batch.texts.ids.clone()
    ids[0, 1] = 63 - ids[0, 1]
    other = task(replace(batch, texts=replace(batch.texts, ids=ids)))["masked_image"].sum
    assert (other - loss).abs() > 1e-6
    loss.backward()  # the text is learned from as well
    assert task.model.text.layers[0].self_attention.query.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in task.learned.parameters())


def test_an_image_reads_its_first_caption(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch([[2, 5, 3]] * 6, image=[1, 0, 1, 0, 2, 2], describes=[False, True, True, True, False, False])
    assert own_text(batch).tolist() == [1, 2, 4]


@pytest.mark.parametrize("config", [ALONE, BOTH])
def test_the_slots_of_bad_samples_do_not_count(tiny_config: MakeConfig, config: ObjectivesConfig) -> None:
    task, batch = made(tiny_config(), config).eval(), given()

    def weighted(*weights: float) -> Loss:
        found: Loss = task(replace(batch, texts=replace(batch.texts, weight=torch.tensor(weights))))["masked_image"]
        return found

    parts = [weighted(*(float(row == i) for i in range(4))) for row in range(4)]
    whole = weighted(1.0, 1.0, 1.0, 1.0)
    assert [int(part.count) for part in parts] == [8] * 4
    torch.testing.assert_close(sum(part.sum for part in parts), whole.sum, rtol=0, atol=1e-10)
    nothing = weighted(0.0, 0.0, 0.0, 0.0)
    assert nothing.sum == nothing.count == 0
    nothing.sum.backward()
    for parameter in task.learned.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_half_precision_is_summed_in_fp32(tiny_config: MakeConfig) -> None:
    task, batch = made(tiny_config()).float().eval(), given()
    exactly = task(batch)["masked_image"].sum
    with torch.autocast("cpu", torch.bfloat16):
        found = task(batch)["masked_image"].sum
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exactly, rtol=2e-2, atol=0)


def test_each_view_is_encoded_once_and_the_masked_one_whole(tiny_config: MakeConfig) -> None:
    """With dropped patches and a teacher: the plain view has half its patches, the masked one and the teacher's all."""
    settings = ObjectivesConfig(masked_image=1.0, word_patch=0.1, momentum=0.9, captioning=1.0)
    task = made(tiny_config(), settings, patch_drop=0.5)
    task.prepare(2)
    seen: Counter[str] = Counter()

    def count(name: str) -> Callable[[Any, Any, Tensor], None]:
        return lambda module, inputs, tokens: seen.update([f"{name} {tokens.shape[1]}"])

    assert task.teacher is not None
    task.model.image_encoder.backbone.norm.register_forward_hook(count("student"))
    task.teacher.model.image_encoder.backbone.norm.register_forward_hook(count("teacher"))
    task.model.fusion_memory.register_forward_hook(lambda *_: seen.update(["memory"]))
    losses = task(given(masked=True))
    assert seen == {"student 9": 1, "student 17": 1, "teacher 17": 1, "memory": 1}
    assert list(losses) == ["contrastive", "matching", "masked_language", "masked_image", "word_patch", "captioning"]
    assert all(loss.sum.isfinite() for loss in losses.values())


def test_pixels_in_half_precision_are_compared_in_fp32(tiny_config: MakeConfig) -> None:
    task, batch, said = made(tiny_config(), ALONE).bfloat16(), given(), []
    objective = task.objectives["masked_image"]
    assert isinstance(objective, MaskedImage)
    assert batch.hidden is not None
    objective.head.register_forward_hook(lambda _, inputs, output: said.append(output.detach()))
    loss = task(batch)["masked_image"]
    pixels = pick(cut(task.model.image_encoder.normalize(batch.images), 16), batch.hidden)
    assert said[0].dtype == pixels.dtype == torch.bfloat16  # else nothing was to be shown
    assert loss.sum.dtype == torch.float32
    torch.testing.assert_close(loss.sum, (said[0].float() - pixels.float()).abs().mean(2).sum())


def test_nothing_waits_for_the_device(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for the alignment of words and patches, nor for what is dropped."""
    monkeypatch.setattr(lengths, "reads_lengths", lambda _: False)  # as on a GPU
    task = made(tiny_config(), replace(BOTH, word_patch=0.1), patch_drop=0.5)
    batch = given()
    with profile() as profiled:
        sum(loss.sum for loss in task(batch).values()).backward()  # type: ignore[union-attr]
    used = {event.name for event in profiled.events()}
    assert {"aten::scatter", "aten::scatter_reduce"} <= used
    assert not used & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}


def test_its_weights_are_trained_and_survive_a_restart(tiny_config: MakeConfig) -> None:
    task = made(tiny_config())
    named = named_parameters(task.model, task.learned)
    assert not decays("masked_image.mask_token", named["masked_image.mask_token"])
    assert not decays("masked_image.head.bias", named["masked_image.head.bias"])
    assert decays("masked_image.head.weight", named["masked_image.head.weight"])
    optimizer = build_optimizer(task.model, OptimizerConfig(lr=0.1), task.learned)
    before = task.training_state()["learned.masked_image.mask_token"].clone()
    task(given())["masked_image"].sum.backward()
    optimizer.step()
    state = {name: tensor.clone() for name, tensor in task.training_state().items()}
    assert not torch.equal(state["learned.masked_image.mask_token"], before)
    assert not any(name.startswith(("masked_image", "learned")) for name in task.model.state_dict())
    again = made(tiny_config())
    again.load_training_state(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.training_state().items())


def learned(task: Pretraining, batch: Batch, steps: int) -> float:
    """The loss after so many steps on that one batch."""
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        loss = task(batch)["masked_image"]
        optimizer.zero_grad()
        (loss.sum / loss.count).backward()
        optimizer.step()
    return float((loss.sum / loss.count).detach())


def test_it_learns_drawn_scenes(tiny_config: MakeConfig) -> None:
    """Better than the constant of least error, each colour's median over the hidden pixels."""
    task = made(tiny_config(), ALONE, stages=1).float()
    scenes = torch.stack([pil_to_tensor(draw_scene(seed, 64).image) for seed in range(4)])
    batch = replace(given(), images=scenes)
    assert batch.hidden is not None
    pixels = task.model.image_encoder.normalize(scenes)
    squares = pixels.view(4, 3, 4, 16, 4, 16).permute(0, 2, 4, 3, 5, 1).reshape(4, 16, 256, 3)
    hidden = squares[torch.arange(4)[:, None], batch.hidden].reshape(-1, 3)
    constant = float((hidden - hidden.median(0).values).abs().mean())
    assert learned(task, batch, 60) < 0.7 * constant


def test_the_text_says_what_the_image_hides(tiny_config: MakeConfig) -> None:
    """Four images that differ only where they are hidden, each with a word of its own: from the image alone no guess beats the median."""
    batch = given(32)
    images = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    for row, level in enumerate((0, 60, 180, 255)):
        images[row, :, :16] = level
    ids = batch.texts.ids.clone()
    ids[:, 1] = torch.tensor([10, 20, 30, 40])
    batch = replace(batch, images=images, hidden=torch.tensor([[0, 1]] * 4), texts=replace(batch.texts, ids=ids))
    small = tiny_config(text={"layers": 1, "cross_attention": (0,)})
    both, alone = (made(small, config, size=32, stages=1).float() for config in (BOTH, ALONE))
    levels = both.model.image_encoder.normalize(images)[:, :, 0, 0]
    without = learned(alone, batch, 40)
    assert without > 0.95 * float((levels - levels.median(0).values).abs().mean())
    assert learned(both, batch, 40) < 0.5 * without


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            {"name": "test_resnet"},
            "objectives.masked_image cannot hide patches of test_resnet: a convolutional network",
        ),
        ({"frozen": True}, "model.image.frozen=True"),
    ],
)
def test_encoders_that_it_cannot_train(tiny_config: MakeConfig, image: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(tiny_config(), BOTH, **image)


def test_a_batch_that_hides_nothing_says_what_is_missing(tiny_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="the batch hides no patches"):
        made(tiny_config()).counts(Batch.fake(image_size=64))
