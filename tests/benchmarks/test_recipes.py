"""benchmarks/recipes.py: a step without content counts as a true one does, and the tables say what was counted."""

import json
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vlm.build import Parts, build_task
from vlm.data.text import train_wordpiece
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.captioning import predicted

SCRIPT = Path(__file__).parents[2] / "benchmarks/recipes.py"
pytest.importorskip("transformers")  # whose modules the step's benchmark, which draws the batch, is compared with


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_a_step_without_content_counts_as_a_true_one(script: dict[str, Any]) -> None:
    config = script["published"]("tiny")
    found = script["cost"]("tiny", config)
    torch.manual_seed(1)
    tokenizer = train_wordpiece(["a red dog"], 60, min_frequency=1)
    task = build_task(config, Parts(config, tokenizer, VisionLanguageModel(config.model))).train()
    assert found.parameters == found.trained == sum(p.numel() for p in task.parameters())
    assert (found.gradients, found.moments, found.teacher, found.queue) == (4 * found.trained, 8 * found.trained, 0, 0)
    with patch("vlm.model.lengths.reads_lengths", lambda _: False):
        batches = [script["draw"](config, task, pairs) for pairs in (2, 3)]
        assert script["operations"](task, batches[1], nullcontext()) / 3 == found.flops
        few, more = (script["saved"](task, batch, nullcontext()) for batch in batches)
    assert found.activation_bytes == pytest.approx(more - few, rel=1e-3)
    assert found.activation_bytes > 3 * 64 * 64


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_convolution_s_gradients_cost_what_it_costs(script: dict[str, Any], groups: int) -> None:
    convolution = torch.nn.Conv2d(8, 16, 3, padding=1, groups=groups)
    images = torch.randn(2, 8, 5, 5, requires_grad=True)
    aten = torch.ops.aten.convolution_backward
    with FlopCounterMode(display=False, custom_mapping={aten: script["convolution_backward"]}) as counter:
        convolution(images).sum().backward()
    forward = 2 * (2 * 5 * 5) * 16 * (8 // groups) * 3 * 3
    assert counter.get_total_flops() == 3 * forward


def test_a_selection_has_as_many_rows_as_there_are_tokens_to_predict(script: dict[str, Any]) -> None:
    config = script["published"]("tiny")
    batch = script["draw"](config, SimpleNamespace(model=SimpleNamespace(image_encoder=None)), 3)
    wanted = predicted(batch.texts.mask, batch.texts.prompt)
    rows, selected = len(wanted.nonzero()), script["Selections"](batch)
    with FakeTensorMode() as fake, selected:
        states = torch.empty(*wanted.shape, 7)[fake.from_tensor(wanted)]
    assert states.shape == (rows, 7)


def test_hours_are_operations_over_what_the_machine_does(script: dict[str, Any]) -> None:
    assert script["hours"](989e12 * 0.4 * 3600, 1, 0.4) == pytest.approx(1)
    assert script["hours"](249e9, 4e6 * 30, 0.4) == pytest.approx(249e9 * 120e6 / (0.4 * 989e12 * 3600))


def test_the_tables_and_the_json(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = script["main"]
    sizes = dict(
        zip(
            ("weights", "gradients", "moments", "teacher", "queue", "copies"),
            (2**30 * i for i in range(1, 7)),
            strict=True,
        )
    )
    one = script["Cost"]("tiny", 64, 10_500_000, 9_000_000, **sizes, activation_bytes=3.0 * 2**20, flops=2e11)
    monkeypatch.setitem(main.__globals__, "cost", lambda name, config: one)
    monkeypatch.setattr(sys, "argv", ["recipes.py", "tiny", "compact_self_critical", "--pairs", "4e6", "--mfu", "0.5"])
    assert main() == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[2] == "| `tiny` | 64 | 10.5, 9.0 | 6.00 | 4.00 | 5.00 | 6.00 | 3 | 200.0 | 0.11 |"
    assert lines[-1] == "| `tiny`, 2 | 1 |"  # 2 epochs of 4 million at 0.1123 hours a million
    assert len({line.count("|") for line in lines[:3]}) == len({line.count("|") for line in lines[4:]}) == 1
    assert "compact_self_critical draws captions" in output.err
    monkeypatch.setattr(sys, "argv", ["recipes.py", "tiny", "--json"])
    assert main() == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fixed"], found["name"]) == (21 * 2**30, "tiny")
    monkeypatch.setattr(sys, "argv", ["recipes.py", "tinny"])
    with pytest.raises(SystemExit):
        main()


@pytest.mark.slow
def test_albef_in_full_size_comes_to_what_a_true_step_counts(script: dict[str, Any]) -> None:
    """249,337,445,376 operations a pair, by one step of the full model with true weights in fp32 (in 4 GB), instead of this one's none."""
    found = script["cost"]("albef_base", script["published"]("albef_base"))
    assert found.flops == 249_337_445_376
    assert found.teacher == found.weights == 4 * found.parameters
    assert found.queue == 65_537 * (2 * 256 * 4 + 8) + 8
