"""Operations are counted by their definition, counting leaves no trace, and a device's name finds its peak."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vlm.build import build_parts, build_task, load_sets, training_loader
from vlm.config import Config
from vlm.run import train
from vlm.train import cost
from vlm.train.cost import Cost, Operations, held, peak, peak_memory
from vlm.train.distributed import Ranks
from vlm.train.report import read_json_lines, training_line
from vlm.train.trainer import Trainer

MakeConfig = Callable[..., Config]
ALONE = Ranks(0, 1, torch.device("cpu"))


def work(x: torch.Tensor, weight: torch.Tensor, again: bool = False) -> torch.Tensor:
    """(B, 2, L, 8) states through one linear map and attention."""

    def run(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(F.linear(x, weight), x, x)

    return (checkpoint(run, x, use_reentrant=False) if again else run(x)).sum()


def counted(again: bool = False) -> int:
    x, weight = torch.randn(3, 2, 16, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    with Operations() as operations:
        total = work(x, weight, again)
        with operations.backward():
            total.backward()
    return operations.count


def test_operations_are_those_of_the_definition() -> None:
    """Three times the forward pass, by hand and by torch's counter of the plain form of attention, whichever kernel ran."""
    forward = 2 * (3 * 2 * 16) * 8 * 8 + 2 * 2 * (3 * 2) * 16 * 16 * 8
    assert counted() == 3 * forward
    x, weight = torch.randn(3, 2, 16, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as torchs, sdpa_kernel(SDPBackend.MATH):
        work(x, weight).backward()
    assert torchs.get_total_flops() == 3 * forward


def test_what_checkpointing_computes_again_does_not_count() -> None:
    assert counted(again=True) == counted()


def trainer_of(config: Config) -> Trainer:
    sets = load_sets(config.data.splits.train, "data.splits.train", config.data.cache)
    parts = build_parts(config, sets)
    task = build_task(parts.config, parts)
    return Trainer(task, training_loader(config, parts, sets, ALONE), config, ALONE, None, lambda name, *_: Path(name))


@pytest.mark.parametrize("measures", [False, True])
def test_counting_leaves_no_trace(make_config: MakeConfig, measures: bool) -> None:
    """Bit for bit: weights, queue, teacher, batch-norm statistics and random numbers, with dropout and hard negatives."""
    changes = {"task": "pretraining", "objectives.momentum": 0.9, "objectives.queue": 20, "train.accumulate": 2}
    found = []
    for counts in (False, True):
        trainer = trainer_of(make_config({**changes, "data.splits.val": []}))
        torch.manual_seed(1)
        trainer.cost.per_sample = None if counts else 1.0
        trainer.cost.measures = measures
        trainer.task.train()
        batches = trainer._batches()
        for _ in range(2):
            trainer._step(trainer._next(batches)[0], trainer.meter)
        found.append((trainer, torch.get_rng_state()))
    (one, random), (two, after) = found
    assert torch.equal(random, after)
    other = two.task.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.task.state_dict().items())
    assert two.cost.per_sample is not None
    assert two.cost.per_sample > 1e5
    assert bool(two.cost.activations) == measures


def test_a_run_counts_once_and_logs_what_it_reaches(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that goes on keeps the first one's count. The CPU's peak is not known: no share of it is said."""
    counts = 0
    original = Operations.__init__

    def begin(self: Operations) -> None:
        nonlocal counts
        counts += 1
        original(self)

    monkeypatch.setattr(Operations, "__init__", begin)
    config = make_config({"train.epochs": 2 / 6, "data.splits.val": []})
    train(config)
    assert counts == 1
    lines = [line for line in read_json_lines(Path(config.out) / "log.jsonl") if line["kind"] == "train"]
    state = torch.load(f"{config.out}/latest/training/state.pt", weights_only=True)
    for line in lines:
        assert line["tflops"] == pytest.approx(state["operations"] * line["samples_per_second"] / 1e12)
        assert 0.05 < line["memory_gib"] < 64
        assert "mfu" not in line
    said = capsys.readouterr().err
    assert "TFLOP/s | data wait" in said
    assert " GiB\n" in said
    assert "MFU" not in said
    second = trainer_of(config)
    second.load_state(state)
    second._step(second._next(second._batches())[0], second.meter)
    assert counts == 1


def test_rates_are_those_of_one_device_against_its_peak() -> None:
    """Two ranks, 1,000 samples a second of 300 GFLOP each: 150 TFLOP/s on each device."""
    found = Cost(Ranks(0, 2, torch.device("cpu")), "bf16")
    assert set(found.figures(1000.0)) == {"memory_gib"}  # nothing is counted yet
    found.per_sample, found.peak = 300e9, peak("NVIDIA A100-SXM4-80GB", "bf16")
    figures = found.figures(1000.0)
    assert figures["tflops"] == pytest.approx(150)
    assert figures["mfu"] == pytest.approx(150 / 312)
    values = {
        "loss": 1.0,
        "a/loss": 1.0,
        "lr": 1e-3,
        "samples_per_second": 1e3,
        "data_wait": 0.02,
        "filled": 0,
        **figures,
    }
    values |= {"filled": 3, "filled/unreadable": 2, "filled/too small": 1, "eta_seconds": 61.0, "memory_gib": 12.345}
    assert training_line(5, 10, 0.5, ["a"], values) == (
        "step 5/10 (epoch 0.50) | loss 1 | a 1 | lr 1.00e-03 | 1000.0 samples/s | 150 TFLOP/s | MFU 48.1% | data wait 2% | memory 12.3 GiB | "
        "3 bad samples (2 unreadable, 1 too small) | eta 1:01"
    )


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("CPU", None),
    ],
)
def test_a_device_is_known_by_its_name(name: str, tflops: float | None) -> None:
    assert peak(name, "bf16") == peak(name, "fp16") == (None if tflops is None else tflops * 1e12)
    assert peak(name, "fp32") is None


def test_a_v100_has_no_bf16() -> None:
    assert (peak("Tesla V100-SXM2-16GB", "fp16"), peak("Tesla V100-SXM2-16GB", "bf16")) == (125e12, None)


def test_memory_is_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert held([torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)]) == 64
    assert 2**26 < peak_memory(torch.device("cpu")) < 2**36
    monkeypatch.setattr(cost.sys, "platform", "darwin")  # which counts bytes itself
    assert peak_memory(torch.device("cpu")) < 2**26


def test_a_grouped_convolution_s_gradients_cost_two_forward_passes() -> None:
    """torch's own formula counts them as those of a full convolution, here 8 times too many."""
    layer = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    images = torch.randn(2, 8, 6, 5, requires_grad=True)
    with Operations() as operations:
        made = layer(images)
        forward = operations.count
        with operations.backward():
            made.sum().backward()
    assert forward == 2 * 2 * 8 * 6 * 5 * 9
    assert operations.count == 3 * forward
