"""`--dry-run` shows settings, parameters, operations, memory, the first batch and one step, and writes nothing."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from vlm.config import Config
from vlm.dry_run import dry_run
from vlm.train import compiling, trainer

MakeConfig = Callable[..., Config]


def memory(said: str) -> dict[str, float]:
    """The estimate's parts in MiB, with `all`."""
    found = re.search(r"memory in MiB, at least: (\d+) \((.*?)\); this process", said)
    assert found is not None
    parts = [part.rsplit(" ", 1) for part in found[2].split(", ")]
    return {"all": float(found[1]), **{name: float(size) for name, size in parts}}


def test_it_shows_what_a_run_would_do(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {
        "task": "pretraining",
        "model.text.dim": 128,
        "model.text.feed_forward_dim": 512,
        "objectives.queue": 1024,
    }
    config = make_config({**changes, "objectives.momentum": 0.9, "train.averaging": 0.9, "train.accumulate": 2})
    dry_run(config)
    said = capsys.readouterr().err
    settings = yaml.safe_load(said[said.index("task:") : said.index("pretraining into")])
    assert settings["model"]["text"]["dim"] == 128
    assert re.search(r"parameters in millions: \d\.\d \(image_encoder", said)
    for line in ("images (4, 3, 32, 32) uint8", "image_ids (4,) int64", "texts.weight (4,) float32", "masked.ids (4, "):
        assert f"\n{line}" in said, line
    assert re.search(r"\n  scene\S+: 'a \w+ .*' \(\d+ tokens, prompt 1\)\n", said)
    assert len(re.findall(r"\n  scene\S+: '", said)) == 4, "the texts of four images"
    assert "one step: contrastive/loss" in said
    assert re.search(r"\nit took \d+\.\d\d s", said)
    assert re.search(r"\n0\.\d+ GFLOP a sample, forward and backward", said)
    assert not Path(config.out).exists()
    sizes = memory(said)
    assert sizes["parameters"] == pytest.approx(sizes["gradients"], abs=0.1)
    assert sizes["AdamW"] == pytest.approx(2 * sizes["gradients"], abs=0.2)
    assert sizes["averaged copy"] == pytest.approx(sizes["parameters"], abs=0.1)
    queue = 1025 * (2 * 16 * 4 + 8) / 2**20
    assert sizes["teacher and queue"] == pytest.approx(sizes["parameters"] + queue, abs=0.11)
    assert sizes["activations of a micro-batch of 4"] > 0.5
    assert sizes["all"] == pytest.approx(sum(size for name, size in sizes.items() if name != "all"), abs=1)


def test_activations_grow_with_the_batch_and_shrink_by_checkpointing(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = []
    for batch, again in ((4, False), (8, False), (8, True)):
        dry_run(make_config({"data.batch_size": batch, "model.text.checkpointing": again, "data.splits.val": []}))
        sizes = memory(capsys.readouterr().err)
        assert "averaged copy" not in sizes
        assert "teacher and queue" not in sizes
        kept.append(sizes[f"activations of a micro-batch of {batch}"])
    small, large, checkpointed = kept
    assert 1.5 * small < large < 2.5 * small
    assert checkpointed < 0.9 * large


@pytest.mark.slow
def test_it_says_how_much_was_compiled(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counted step runs as it is written, the next one compiled, without a break of the graph."""
    torch._dynamo.reset()
    monkeypatch.setattr(trainer, "compile_parts", lambda task: compiling.compile_parts(task, "eager"))
    dry_run(make_config({"train.compile": True, "model.text.layers": 1, "model.text.cross_attention": [0]}))
    said = capsys.readouterr().err
    found = re.search(
        r"\ntorch\.compile: (\d+) graphs, (\d+) recompilations .*, (\d+) graph breaks; with compiling, it took", said
    )
    assert found is not None, said
    graphs, again, breaks = (int(n) for n in found.groups())
    assert 3 <= graphs <= 12
    assert again <= graphs
    assert breaks == 0
