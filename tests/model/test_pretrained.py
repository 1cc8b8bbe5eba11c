"""A checkpoint comes back bit for bit; a damaged one is refused in one line that says why; a failed save leaves the old one."""

import errno
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm import checkpoint as run_checkpoint
from vlm.checkpoint import checkpoint_metadata, read_answers, read_trained_on, write_checkpoint
from vlm.config import Config, ModelConfig
from vlm.errors import CheckpointError, ConfigError, UserError
from vlm.model import pretrained
from vlm.model.pretrained import load_metadata, load_pretrained, replacing_folder, save_pretrained
from vlm.model.vision_language import VisionLanguageModel

MakeConfig = Callable[..., ModelConfig]


@pytest.fixture
def model(tiny_config: MakeConfig) -> VisionLanguageModel:
    torch.manual_seed(3)
    return VisionLanguageModel(tiny_config(decoder="separate", decoder_layers=2, first_token={"decoder": 7}))


@pytest.fixture
def folder(model: VisionLanguageModel, tmp_path: Path) -> Path:
    """A checkpoint of the model."""
    return save(model, tmp_path / "checkpoint")


def save(
    model: VisionLanguageModel, folder: Path, shard_bytes: int = 5 * 2**30, dtype: torch.dtype | None = None
) -> Path:
    state = {
        k: v.to(dtype) if dtype is not None and v.is_floating_point() else v for k, v in model.state_dict().items()
    }
    with replacing_folder(folder) as new:
        save_pretrained(state, new, checkpoint_metadata(Config(model=model.config)), "{}", "card", shard_bytes)
    return folder


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def refused(folder: Path) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_round_trip_bit_for_bit(model: VisionLanguageModel, folder: Path) -> None:
    back, metadata = load_pretrained(folder)
    assert same(back.state_dict(), model.state_dict())
    assert back.config == model.config
    assert not back.training
    assert metadata["generation"] == json.loads(json.dumps(asdict(Config().generation)))
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_large_models_are_cut_into_files(model: VisionLanguageModel, tmp_path: Path) -> None:
    limit = 100_000
    folder = save(model, tmp_path / "parts", limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    assert not (folder / "model.safetensors").exists()
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert same(load_pretrained(folder)[0].state_dict(), model.state_dict())
    files[1].unlink()
    assert f"{files[1].name} is missing" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load(model: VisionLanguageModel, tmp_path: Path, dtype: torch.dtype) -> None:
    back, _ = load_pretrained(save(model, tmp_path / "half", dtype=dtype))
    for name, value in model.state_dict().items():
        want = value.to(dtype).to(value.dtype) if value.is_floating_point() else value
        assert torch.equal(back.state_dict()[name], want)


def test_settings_may_be_changed_before_the_model_is_built(folder: Path) -> None:
    back, _ = load_pretrained(folder, lambda config: replace(config, text=replace(config.text, dropout=0.4)))
    assert back.config.text.dropout == 0.4


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    assert "no such checkpoint folder; give a folder that holds config.json, model.safetensors" in refused(
        tmp_path / "none"
    )
    assert "Did you mean" in refused(tmp_path)
    (folder / "model.safetensors").rename(folder / "weights")
    assert refused(folder) == f"{folder}: model.safetensors is missing."
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "model.safetensors is missing. pytorch_model.bin is a pickle and is never loaded" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json is missing" in refused(folder)


@pytest.mark.parametrize("kept", [0, 5, 300, -1000, -1])
def test_a_weights_file_of_another_size(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = refused(folder)
    assert (
        f"model.safetensors: not a whole safetensors file ({path.stat().st_size:,} bytes): cut short or damaged"
        in message
    )
    assert message.endswith("copy it again.")


def test_a_longer_weights_file(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"0" * 100)
    assert "not a whole safetensors file" in refused(folder)


class Dangerous:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["zip", "old", 2, 3, 4, 5])
def test_a_pickle_in_place_of_the_weights_is_never_loaded(folder: Path, tmp_path: Path, form: str | int) -> None:
    path = folder / "model.safetensors"
    danger = {"weights": Dangerous(tmp_path / "ran")}
    if isinstance(form, int):
        path.write_bytes(pickle.dumps(danger, protocol=form))
    else:
        torch.save(danger, path, _use_new_zipfile_serialization=form == "zip")
    assert "model.safetensors: a pickle" in refused(folder)
    assert "never loaded" in refused(folder)
    assert not (tmp_path / "ran").exists()


def test_a_folder_in_place_of_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "model.safetensors: not a file" in refused(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not readable as JSON"),
        ('{"model": {', "not readable as JSON"),
        ("\0\1\2", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[]", "has no `model` settings"),
        ('{"model": 3}', "has no `model` settings"),
        ('{"architectures": ["BertModel"]}', "it was not written by this library"),
        ('{"model": {}}', "model settings do not fit this version"),
        ('{"model": {"image": 1, "text": 2}}', "model settings do not fit this version"),
    ],
)
def test_a_damaged_config(folder: Path, text: str, reason: str) -> None:
    (folder / "config.json").write_text(text)
    assert reason in refused(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            ("dim", "wide"),
            ("dim", -4),
            ("dim", None),
            ("heads", 0),
            ("heads", 5),
            ("layers", "two"),
            ("vocab_size", 1.5),
        ],
        *[("cross_attention", "all"), ("cross_attention", 3), ("surprise", 1), ("activation", "magic")],
    ],
)
def test_a_config_with_a_wrong_value(folder: Path, key: str, value: Any) -> None:
    metadata = json.loads((folder / "config.json").read_text())
    metadata["model"]["text"][key] = value
    (folder / "config.json").write_text(json.dumps(metadata))
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_config_from_before_heads_had_names_has_all(folder: Path) -> None:
    metadata = json.loads((folder / "config.json").read_text())
    del metadata["model"]["heads"]
    (folder / "config.json").write_text(json.dumps(metadata))
    assert load_pretrained(folder)[0].config.heads == ("contrastive", "matching", "masked_language", "language")


def test_weights_that_do_not_fit_name_the_first(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["matching_head.weight"] = torch.zeros(2, 3)
    state["stranger"] = state.pop("temperature")
    save_file(state, folder / "model.safetensors")
    message = refused(folder)
    assert "the weights do not fit config.json: 1 missing (temperature); 1 unexpected (stranger)" in message
    assert "1 of another shape (matching_head.weight (2, 3) instead of (2, 32))" in message


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "..", ".", 5, None, "", "weights.bin", "a/b.safetensors"]
)
def test_an_index_may_name_files_of_the_folder_only(folder: Path, tmp_path: Path, name: Any) -> None:
    shutil.copy(folder / "model.safetensors", tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"temperature": name}}))
    message = refused(folder)
    assert "no .safetensors file inside the folder; it cannot be trusted" in message
    assert repr(name) in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [], "b": {}}}'])
def test_a_damaged_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: not readable" in refused(folder)


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk does, for this process alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_checkpoint(model: VisionLanguageModel, folder: Path) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.temperature.fill_(0.3)
    with small_disk(50_000), pytest.raises(UserError) as caught:
        save(model, folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: could not be saved (")
    assert "what was there before is untouched. Free space" in message
    assert "\n" not in message
    assert same(load_pretrained(folder)[0].state_dict(), before)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    save(model, folder)
    assert load_pretrained(folder)[0].temperature.item() == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["save_file", "os.fsync", "write_text"])
def test_no_space_left_at_any_write(
    model: VisionLanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = load_file(folder / "model.safetensors")
    with monkeypatch.context() as patch:
        if name == "write_text":
            patch.setattr(Path, name, full)
        else:
            patch.setattr(f"vlm.model.pretrained.{name}", full)
        with pytest.raises(UserError, match=r"could not be saved \(No space left on device\)"):
            save(model, folder)
    assert same(load_file(folder / "model.safetensors"), before)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_checkpoint(folder: Path, error: type[BaseException]) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail() -> None:
        with replacing_folder(folder) as new:
            (new / "config.json").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_folder_that_cannot_be_written_is_one_line(model: VisionLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/checkpoint: could not be saved \((Not a directory|File exists)\)"):
        save(model, tmp_path / "file" / "checkpoint")


def test_killed_between_the_two_renames_is_repaired_by_reader_and_writer(
    model: VisionLanguageModel, folder: Path
) -> None:
    old, new = folder.with_name(".checkpoint.old"), folder.with_name(".checkpoint.new")
    shutil.copytree(folder, new)
    folder.rename(old)
    assert load_metadata(folder)["task"] == "pretraining"  # a reader puts it back
    assert not old.exists()
    folder.rename(old)
    save(model, folder)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_killed_after_the_renames_leaves_nothing_behind(folder: Path) -> None:
    old = folder.with_name(".checkpoint.old")
    shutil.copytree(folder, old)
    (old / "config.json").write_text("the older one")
    assert load_metadata(folder)["task"] == "pretraining"
    assert not old.exists()


def test_a_reader_waits_for_a_writer_between_its_renames(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would put the old folder in the new one's way, and the save would fail."""
    old, new = folder.with_name(".checkpoint.old"), folder.with_name(".checkpoint.new")
    shutil.copytree(folder, new)
    (new / "README.md").write_text("new")
    folder.rename(old)
    monkeypatch.setattr(pretrained.time, "sleep", lambda _: new.rename(folder))  # the writer goes on
    load_metadata(folder)
    assert (folder / "README.md").read_text() == "new"


def test_a_run_s_checkpoint_holds_what_later_stages_need(model: VisionLanguageModel, tmp_path: Path) -> None:
    config = Config(model=model.config, task="vqa", out=str(tmp_path))
    ids = torch.tensor([-(2**63), -5, 7, 2**63 - 1])
    folder = write_checkpoint(tmp_path / "best", config, model, "{}", {"val": {"accuracy": 12.345}}, ids, ["yes", "no"])
    back = read_trained_on(folder)
    assert back is not None
    assert torch.equal(back, ids)
    assert read_answers(folder) == ["yes", "no"]
    assert load_metadata(folder)["scores"] == {"val": {"accuracy": 12.345}}
    card = (folder / "README.md").read_text()
    assert "| val | accuracy | 12.35 |" in card or "| val | accuracy | 12.34 |" in card
    assert "pipeline_tag: visual-question-answering" in card
    assert read_trained_on(tmp_path) is None
    assert read_answers(tmp_path) == []
    for name, read in ((run_checkpoint.TRAINED_ON, read_trained_on), (run_checkpoint.ANSWERS, read_answers)):
        (folder / name).write_text("[1, 2")
        with pytest.raises(CheckpointError, match=f"{name}: .*copy the checkpoint again"):
            read(folder)
