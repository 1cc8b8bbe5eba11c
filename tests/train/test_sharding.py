"""A run in pieces (FSDP2) is the run of one process, in fp64, and each goes on from what the other saved. Run as a script, this file is one of the
processes; they meet over gloo on the CPU.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vlm.checkpoint import write_checkpoint
from vlm.config import Config, ImageConfig, ModelConfig, ObjectivesConfig, OptimizerConfig, TrainConfig
from vlm.data.batch import Batch
from vlm.errors import CheckpointError, ConfigError
from vlm.model import lengths
from vlm.model.pretrained import load_pretrained
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives import matching
from vlm.tasks.pretraining import Pretraining
from vlm.train import sharding, state
from vlm.train.distributed import Ranks
from vlm.train.trainer import Trainer

ALONE = Ranks(0, 1, torch.device("cpu"))
HALF, STEPS = 2, 4


def _beside(name: str) -> ModuleType:
    """The tests of the objectives, whose batches are cut for ranks and joined for one process."""
    spec = importlib.util.spec_from_file_location("joint", Path(__file__).parents[1] / "objectives" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["joint"] = module
    spec.loader.exec_module(module)
    return module


JOINT = _beside("test_distributed.py")


@dataclass(frozen=True)
class Case:
    """layers: whether text layers are units, as on a GPU."""

    objectives: ObjectivesConfig
    image: ImageConfig = field(default_factory=lambda: ImageConfig(name="test_vit", image_size=32))
    text: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    layers: bool = False


QUIET = ObjectivesConfig(contrastive=1.0, matching=0.0, masked_language=0.7, captioning=0.4)
CASES = {
    "teacher": Case(replace(QUIET, captioning=0.0, momentum=0.9, queue=8, alpha_ramp=1.0), layers=True),
    "accumulated": Case(
        replace(QUIET, matching=0.5, negatives="joined"), text={"checkpointing": True}, accumulate=2, layers=True
    ),
    "frozen": Case(
        ObjectivesConfig(
            contrastive=1.0, contrastive_loss="sigmoid", matching=0.0, masked_language=0.0, captioning=0.5
        ),
        ImageConfig(name="test_resnet", image_size=32, trainable_blocks=2, batch_norm="frozen"),
    ),
    "learned": Case(replace(QUIET, captioning=0.0, contrastive_loss="sigmoid", masked_image=0.5), layers=True),
}


@dataclass
class Batches:
    """Of an epoch, given."""

    batches: list[Batch]

    @property
    def steps(self) -> int:
        return len(self.batches)

    def iterate(self, epoch: int, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        return iter(self.batches[start_step:stop_step])


def trainer_of(name: str, ranks: Ranks, out: Path, world: int = 0, kind: Any = "fsdp") -> Trainer:
    """world: of the ranks whose batches one process has joined; by default the batches are this rank's."""
    case = CASES[name]
    torch.manual_seed(0)
    text = replace(JOINT.TEXT, **case.text)
    model = VisionLanguageModel(ModelConfig(image=case.image, text=text, embed_dim=8))
    for parameter in (model.image_projection.weight, model.text_projection.weight):  # type: ignore[union-attr]
        nn.init.normal_(parameter, std=0.5)
    task = Pretraining(model, case.objectives).double()
    count = STEPS * case.accumulate
    cut: Callable[[int, int], Batch] = JOINT.part
    if world:
        batches = [JOINT.joined([cut(rank, step) for rank in range(world)]) for step in range(count)]
    else:
        batches = [cut(ranks.rank, step) for step in range(count)]
    config = Config(
        out=str(out),
        model=model.config,
        optimizer=OptimizerConfig(lr=5e-3, warmup_steps=1, weight_decay=0.1, clip=1.0),
        train=TrainConfig(epochs=1, accumulate=case.accumulate, precision="fp32", averaging=0.5, sharding=kind),
    )

    def save(folder: str, whole: nn.Module, scores: dict[str, Any], saved: dict[str, Any] | None) -> Path:
        return write_checkpoint(out / folder, config, whole, "{}", scores, state=saved)

    return Trainer(task, Batches(batches), config, ranks, None, save)


def go_on(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Makes steps; what the log would say of them."""
    trainer.task.train()
    batches = trainer._batches()
    for _ in range(steps):
        trainer._step(trainer._next(batches)[0], trainer.meter)
        trainer.step += 1
    return trainer.meter.take(trainer.ranks)


def process(rank: int, world: int, folder: Path, names: list[str]) -> None:
    """One of the processes: each case in pieces, saved half-way and at the end; the first one from what one process saved, too."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    ranks = Ranks(rank, world, torch.device("cpu"))
    for name in names:
        case = CASES[name]
        with ExitStack() as patched:
            patched.enter_context(patch.object(matching, "sample_negatives", JOINT.hardest))
            if case.layers:
                patched.enter_context(patch.object(lengths, "reads_lengths", lambda mask: False))
                patched.enter_context(patch.object(sharding, "_same_on_every_rank", lambda name, device: True))
            trainer = trainer_of(name, ranks, folder / name)
            told = {"units": [key for key, m in trainer.task.named_modules() if isinstance(m, FSDPModule)]}
            told["first"] = go_on(trainer, HALF)
            trainer.save("half", with_state=True)
            told["second"] = go_on(trainer, STEPS - HALF)
            trainer.save("end", with_state=True)
            told["held"] = sum(sharding.local(p).numel() for p in trainer.task.parameters())
            told["moments"] = sum(
                sharding.local(m).numel() for s in trainer.optimizer.state.values() for m in s.values()
            )
            torch.save(told, folder / f"{name}.{rank}.pt")
            if name == "teacher":
                other = trainer_of(name, ranks, folder / name)
                other.load_state(state.load_state(folder / name / "alone"))
                go_on(other, STEPS - HALF)
                other.save("from alone", with_state=True)
    dist.destroy_process_group()


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    """All that training changes, in one process. The queue's last row is nobody's."""
    found = state._flat(trainer.state())
    return {name: t[:-1] if ".queue." in name and t.ndim else t for name, t in found.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=f"{where}: {name}")


@pytest.mark.parametrize(
    ("world", "names"),
    [
        (2, ["teacher", "frozen"]),
        pytest.param(2, ["accumulated", "learned"], marks=pytest.mark.slow),
        pytest.param(4, ["teacher", "accumulated"], marks=pytest.mark.slow),
    ],
)
def test_pieces_are_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, names: list[str]) -> None:
    """Weights, moments, averages, teacher and queue after each half; both ways between one process and pieces; the weights as saved."""
    monkeypatch.setattr(matching, "sample_negatives", JOINT.hardest)
    alone = {name: trainer_of(name, ALONE, tmp_path / name, world) for name in names}
    told = {name: [go_on(trainer, HALF)] for name, trainer in alone.items()}
    halves = {name: {k: t.clone() for k, t in tensors(trainer).items()} for name, trainer in alone.items()}
    alone[names[0]].save("alone", with_state=True)
    command = [sys.executable, __file__, str(tmp_path), str(world), ",".join(names)]
    running = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(world)]
    for name, trainer in alone.items():
        told[name].append(go_on(trainer, STEPS - HALF))
    for one in running:
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors
    for name, trainer in alone.items():
        expected = tensors(trainer)
        check_reports(name, told[name], [torch.load(tmp_path / f"{name}.{rank}.pt") for rank in range(world)], trainer)
        resumed = trainer_of(name, ALONE, tmp_path / name, world)
        resumed.load_state(state.load_state(tmp_path / name / "half"))
        same(tensors(resumed), halves[name], f"{name}, half")
        go_on(resumed, STEPS - HALF)
        same(tensors(resumed), expected, f"{name}, pieces then one process")
        for folder in ["end", "from alone"][: 2 if name == "teacher" else 1]:
            resumed.load_state(state.load_state(tmp_path / name / folder))
            same(tensors(resumed), expected, f"{name}, {folder}")
        saved = load_pretrained(tmp_path / name / "end")[0].state_dict()
        for key, value in trainer.averaging.best(trainer.task.model).state_dict().items():
            torch.testing.assert_close(saved[key], value.to(saved[key].dtype), rtol=1e-6, atol=1e-7, msg=key)


def check_reports(name: str, alone: list[dict[str, Any]], ranks: list[dict[str, Any]], trainer: Trainer) -> None:
    """The log's lines are those of one process; what is divided is, and nothing is gathered for good."""
    parameters = sum(p.numel() for p in trainer.task.parameters())
    moments = sum(m.numel() for s in trainer.optimizer.state.values() for m in s.values())
    assert sum(rank["moments"] for rank in ranks) < moments * 1.01 + 2000
    for rank in ranks:
        assert any("image_encoder" in unit for unit in rank["units"]) == (name != "frozen")
        assert any("text.layers.1" in unit for unit in rank["units"]) == CASES[name].layers
        for half, expected in zip(("first", "second"), alone, strict=True):
            assert rank[half] == pytest.approx(expected, rel=1e-6, abs=1e-9)
        if name != "frozen":  # frozen weights stay whole
            assert rank["held"] < parameters * (1 / len(ranks) + 0.05)


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    """One rank's file, of a folder that was copied in part."""
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / "shard-00001.safetensors").touch()
    state.save_state(tmp_path, {"step": 3, "pieces": str(staged)})
    assert state.load_state(tmp_path)["pieces"] == str(tmp_path / "training" / "pieces")
    (tmp_path / "training" / "pieces" / "shard-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pieces: shard-00001\.safetensors is missing; resume from another"):
        state.load_state(tmp_path)


def test_what_ranks_do_differently_is_refused(tiny_config: Callable[..., ModelConfig]) -> None:
    task = Pretraining(VisionLanguageModel(tiny_config()), replace(QUIET, answering=1.0))
    with pytest.raises(ConfigError, match=r"train\.sharding=fsdp: .* for answering, .* use ddp"):
        sharding.Sharding(task, Ranks(0, 2, torch.device("cpu")), "fsdp")


def test_moments_are_laid_out_as_their_weights_are() -> None:
    """Convolutions have their channels last in one process only; a fused optimizer walks through both in the memory's order."""
    value, like = torch.randn(4, 3, 2, 2), torch.empty(4, 3, 2, 2).to(memory_format=torch.channels_last)
    found = sharding.part_of(value, like)
    assert found.stride() == like.stride() != value.stride()
    assert torch.equal(found, value)
    assert sharding.part_of(value, None) is sharding.part_of(value, torch.empty(4)) is value


if __name__ == "__main__":
    process(int(sys.argv[4]), int(sys.argv[2]), Path(sys.argv[1]), sys.argv[3].split(","))
