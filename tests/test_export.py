"""An exported checkpoint is the mean of what went in, smaller, and still refuses what it was trained on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlm.checkpoint import read_answers, read_trained_on, write_checkpoint
from vlm.cli import main
from vlm.config import Config, ModelConfig
from vlm.errors import CheckpointError, UserError
from vlm.export import export, in_half, mean
from vlm.model.pretrained import load_pretrained, read_weights
from vlm.model.vision_language import VisionLanguageModel

MakeConfig = Callable[..., ModelConfig]


@pytest.fixture
def make(tiny_config: MakeConfig, tmp_path: Path) -> Callable[..., Path]:
    def checkpoint(name: str, seed: int, tokenizer: str = "{}", **settings: int) -> Path:
        torch.manual_seed(seed)
        config = Config(model=tiny_config(**settings))
        model = VisionLanguageModel(config.model)
        seen, state = torch.tensor([seed, 100]), {"step": 1}
        return write_checkpoint(tmp_path / name, config, model, tokenizer, {}, seen, ["yes", "no"], state)

    return checkpoint


def test_the_mean_of_three_runs(make: Callable[..., Path], tmp_path: Path) -> None:
    folders = [make(f"run{seed}", seed) for seed in range(3)]
    size = export(folders, tmp_path / "mean")
    states = [read_weights(folder) for folder in folders]
    got = load_pretrained(tmp_path / "mean")[0].state_dict()
    for name, tensor in got.items():
        if tensor.is_floating_point():
            expected = sum(state[name].double() for state in states) / 3
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(tensor, states[0][name])
    assert size == sum(t.nbytes for t in got.values())
    trained_on = read_trained_on(tmp_path / "mean")
    assert trained_on is not None
    assert trained_on.tolist() == [0, 1, 2, 100]
    assert read_answers(tmp_path / "mean") == ["yes", "no"]
    assert not (tmp_path / "mean/training").exists()


def test_half_in_small_files(make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = make("run", 1), tmp_path / "half"
    assert main(["export", str(folder), "--out", str(out), "--half", "--max-file-mib", "0.05"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 0.")
    stored, before = read_weights(out), read_weights(folder)
    assert all(t.dtype == (torch.float16 if t.is_floating_point() else torch.long) for t in stored.values())
    assert len(list(out.glob("model-*.safetensors"))) > 1
    model = load_pretrained(out)[0]
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        torch.testing.assert_close(tensor, before[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", ["0", "-1", "inf", "nan"])
def test_files_of_no_size_are_refused(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(make("run", 1)), "--out", str(out), "--max-file-mib", size]) == 2
    assert capsys.readouterr().err == f"vlm: --max-file-mib {size}: give a finite number above 0, such as 5120.\n"
    assert not out.exists()


def test_what_does_not_belong_together_is_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    one = make("one", 1)
    with pytest.raises(CheckpointError, match=r"wide is another model than .*one: \d+ tensors differ"):
        export([one, make("wide", 2, embed_dim=24)], tmp_path / "out")
    with pytest.raises(CheckpointError, match="words has another tokenizer than"):
        export([one, make("words", 2, tokenizer='{"a": 1}')], tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        export([one, tmp_path / "nothing"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"one exists; give another --out"):
        export([one], one)


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"scale holds 7e\+04, more than float16 can"):
        in_half("scale", torch.tensor([1.0, -7e4]))
    counter = torch.tensor(70000)
    assert in_half("counter", counter) is counter


def test_one_state_is_its_own_mean() -> None:
    state: dict[str, Tensor] = {"a": torch.randn(3)}
    assert mean({"here": state}) is state
