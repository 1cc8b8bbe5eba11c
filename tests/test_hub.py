"""Checkpoints by name: the hub's client is a stand-in, which has folders by name and takes commits; nothing leaves the machine."""

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil

from vlm.build import build_parts
from vlm.cli import main
from vlm.config import Config
from vlm.convert import convert_blip
from vlm.data.text import train_wordpiece
from vlm.errors import CheckpointError, UserError
from vlm.hub import from_pretrained, local_folder, push_to_hub
from vlm.predictor import Predictor

NAME = "Salesforce/blip-image-captioning-base"
COMMIT = "82a37760796d32b1411fe092ab5d4e227313294b"


@pytest.fixture(scope="session")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers saves its BLIP, tiny, with files that nobody needs."""
    folder = tmp_path_factory.mktemp("blip") / "theirs"
    tokenizer = train_wordpiece(["a red circle left of a blue square"] * 2, 100)
    torch.manual_seed(0)
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "sep_token_id": 3,
    }
    text |= {
        "vocab_size": tokenizer.vocab_size + 2,
        "bos_token_id": tokenizer.vocab_size,
        "max_position_embeddings": 40,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "tf_model.h5").write_bytes(b"unwanted")
    (folder / "training").mkdir()
    (folder / "training" / "state.pt").write_bytes(b"unwanted")
    return folder


class Hub:
    """Stands in for huggingface_hub.snapshot_download: folders by name; keeps what was asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.models, self.asked = root, dict[str, Path](), list[tuple[str, str | None]]()

    def snapshot_download(self, name: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        self.asked.append((name, revision))
        if name not in self.models:
            raise ConnectionError("[Errno -3] Temporary failure in name resolution\nmore")
        target = self.root / name.replace("/", "--") / "snapshots" / COMMIT
        target.mkdir(parents=True, exist_ok=True)
        for file in self.models[name].rglob("*"):
            relative = str(file.relative_to(self.models[name]))
            if file.is_file() and any(fnmatch.fnmatch(relative, pattern) for pattern in allow_patterns):
                shutil.copy(file, target / relative)
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in.snapshot_download)
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return stand_in


def same(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_of_the_hub_is_converted_once(
    hub: Hub, blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.models[NAME] = blip
    convert_blip(blip, tmp_path / "expected")
    folder = local_folder(NAME)
    assert folder.parent.parent == tmp_path / "cache"
    assert folder.name == f"Salesforce--blip-image-captioning-base-{COMMIT}"
    assert same(folder, tmp_path / "expected")
    downloaded = {p.name for p in (hub.root / NAME.replace("/", "--") / "snapshots" / COMMIT).iterdir()}
    assert downloaded == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    }
    assert not list(folder.parent.glob(".*")), "nothing half-done stays"

    monkeypatch.setattr("vlm.convert.convert_blip", lambda *_: pytest.fail("it is converted already"))
    model, metadata = from_pretrained(NAME, revision="main")
    assert hub.asked[-1] == (NAME, "main")
    assert metadata["task"] == "captioning"
    assert all(
        torch.equal(tensor, load_file(folder / "model.safetensors")[name])
        for name, tensor in model.state_dict().items()
    )
    assert Predictor.load(NAME, "cpu").tokenizer.vocab_size == model.config.text.vocab_size - 2
    parts = build_parts(Config(task="captioning", init_from=NAME), [])
    assert torch.equal(parts.model.text.word_embedding, model.text.word_embedding)


def test_a_model_without_safetensors_comes_as_a_pickle_read_as_weights(hub: Hub, blip: Path, tmp_path: Path) -> None:
    hub.models["someone/old"] = tmp_path / "old"
    shutil.copytree(blip, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    convert_blip(blip, tmp_path / "expected")
    assert same(local_folder("someone/old"), tmp_path / "expected")
    assert hub.asked == [("someone/old", None), ("someone/old", COMMIT)]  # both of one commit


def test_a_checkpoint_of_ours_is_used_as_it_is(hub: Hub, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    hub.models["someone/ours"] = checkpoint(answers=("yes", "no"), task="vqa")
    folder = local_folder("someone/ours")
    assert folder.name == COMMIT
    assert same(folder, hub.models["someone/ours"])
    assert Predictor.load("someone/ours", "cpu").answers == ["yes", "no"]
    assert not (tmp_path / "cache").exists()


def test_a_local_folder_in_the_hub_s_form_works_too(hub: Hub, blip: Path, tmp_path: Path) -> None:
    shutil.copytree(blip, tmp_path / "mine")
    (tmp_path / "expected").mkdir()
    convert_blip(blip, tmp_path / "expected" / "a")
    first = local_folder(tmp_path / "mine")
    assert same(first, tmp_path / "expected" / "a")
    assert local_folder("mine") == local_folder(tmp_path / "mine") == first
    settings = json.loads((tmp_path / "mine" / "generation_config.json").read_text())
    (tmp_path / "mine" / "generation_config.json").write_text(json.dumps(settings | {"num_beams": 4}))
    changed = local_folder("mine")
    assert changed != first
    assert Predictor.load("mine", "cpu").generation.beams == 4
    assert hub.asked == []


def test_without_a_network_the_error_says_what_was_tried(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Predictor.load(NAME)
    message = str(caught.value)
    assert message.startswith(
        f"{NAME}: no such folder here, and the hub gave no model of that name (ConnectionError: [Errno"
    )
    assert message.endswith("or download the model elsewhere and give its folder.")
    assert len(message.splitlines()) == 1
    (tmp_path / "runs").mkdir()
    hub.asked.clear()
    for path in ("runs/typo", "./some/where", str(tmp_path / "none"), "a/b/c", "none"):
        with pytest.raises(CheckpointError, match="no such checkpoint folder"):
            Predictor.load(path)
    assert hub.asked == []


def converted_folder(folder: Path) -> dict[str, Any]:
    """Settings, tokenizer and card of a converted folder; the weights are compared by `same`."""
    content = {name: (folder / name).read_text() for name in ("config.json", "tokenizer.json", "README.md")}
    return content | {"README.md": content["README.md"].replace(folder.name, "TARGET")}


def test_convert_takes_a_name_on_the_hub(
    hub: Hub, blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same folder comes of it as of the local one, and no other copy is kept."""
    hub.models[NAME] = blip
    prompt = ("--prompt", "a picture of ")
    assert main(["convert", "blip", str(blip), str(tmp_path / "expected"), *prompt]) == 0
    assert main(["convert", "blip", NAME, str(tmp_path / "ours"), "--revision", "main", *prompt]) == 0
    assert hub.asked == [(NAME, "main")]
    assert same(tmp_path / "ours", tmp_path / "expected")
    ours, expected = converted_folder(tmp_path / "ours"), converted_folder(tmp_path / "expected")
    assert f"in `{NAME}`" in ours["README.md"]
    assert ours == expected | {"README.md": expected["README.md"].replace(f"`{blip}`", f"`{NAME}`")}
    assert not (tmp_path / "cache").exists()

    capsys.readouterr()
    hub.asked.clear()
    assert main(["convert", "blip", NAME, str(tmp_path / "ours")]) == 1
    assert "exists; give another folder" in capsys.readouterr().err
    assert main(["convert", "blip", str(blip), str(tmp_path / "more"), "--revision", "main"]) == 1
    assert "is a folder and no name on the hub; leave the revision 'main' out" in capsys.readouterr().err
    assert hub.asked == []
    # Where there is such a folder, it is the one that is meant.
    shutil.copytree(blip, tmp_path / "someone" / "mine")
    assert main(["convert", "blip", "someone/mine", str(tmp_path / "mine"), *prompt]) == 0
    assert hub.asked == []
    assert same(tmp_path / "mine", tmp_path / "expected")


def test_text_weights_are_converted_from_the_hub_too(hub: Hub, tmp_path: Path) -> None:
    tokenizer = train_wordpiece(["a red circle left of a blue square"] * 2, 100)
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}
    model = BertForMaskedLM(BertConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=32, **shape))
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs" / "tokenizer.json")
    hub.models["google-bert/bert-tiny"] = tmp_path / "theirs"
    assert main(["convert", "bert", str(tmp_path / "theirs"), str(tmp_path / "expected")]) == 0
    assert main(["convert", "bert", "google-bert/bert-tiny", str(tmp_path / "ours"), "--revision", COMMIT]) == 0
    assert hub.asked == [("google-bert/bert-tiny", COMMIT)]
    assert same(tmp_path / "ours", tmp_path / "expected")
    assert "in `google-bert/bert-tiny`" in (tmp_path / "ours" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["blip", "bert"])
def test_convert_without_a_network_says_what_was_tried(
    kind: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", kind, NAME, str(tmp_path / "ours")]) == 1
    message = capsys.readouterr().err
    assert f"{NAME}: no such folder here, and the hub gave no model of that name (ConnectionError: " in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "ours").exists()
    hub.asked.clear()
    assert main(["convert", kind, "./some/where", str(tmp_path / "ours")]) == 1
    assert "config.json does not exist; give a folder" in capsys.readouterr().err
    assert hub.asked == []


def test_a_cache_that_cannot_be_written_is_told(
    hub: Hub, blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.models[NAME] = blip
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set VLM_CACHE to a folder that can"):
        local_folder(NAME)


class Api:
    """Stands in for huggingface_hub.HfApi."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses, self.created, self.files = refuses, list[tuple[str, bool | None]](), dict[str, bytes]()

    def create_repo(self, name: str, private: bool | None = None, exist_ok: bool = False) -> str:
        assert exist_ok
        if self.refuses:
            raise PermissionError("401 Client Error")
        self.created.append((name, private))
        return f"https://hub.example/{name}"

    def create_commit(self, name: str, operations: Any, commit_message: str) -> None:
        assert name == self.created[-1][0]
        for operation in operations:
            content = operation.path_or_fileobj
            self.files[operation.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()


BESIDE = ("answers.json", "trained_on.safetensors", "calibrated_on.safetensors")


def test_a_checkpoint_is_uploaded_with_its_card_and_comes_back(
    hub: Hub, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "best"
    shutil.copytree(checkpoint(), folder)
    (folder / "training").mkdir()
    (folder / "training" / "state.pt").write_bytes(b"secret")
    (folder / "notes.txt").write_text("mine")
    for name in BESIDE:
        (folder / name).write_bytes(b"of the checkpoint")
    api = Api()
    assert push_to_hub(folder, "someone/mine", private=True, api=api) == "https://hub.example/someone/mine"
    assert api.created == [("someone/mine", True)]
    assert set(api.files) == {"config.json", "model.safetensors", "tokenizer.json", "README.md", *BESIDE}
    card = api.files["README.md"].decode()
    assert 'Predictor.load("someone/mine")' in card
    assert card.replace('load("someone/mine")', "") == (folder / "README.md").read_text().replace(
        f'load("{checkpoint().parent}/best")', ""
    )
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()
    for name, content in api.files.items():
        (uploaded / name).write_bytes(content)
    hub.models["someone/mine"] = uploaded
    assert same(local_folder("someone/mine"), folder)


def test_what_is_no_checkpoint_is_not_uploaded(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    api = Api()
    folder = tmp_path / "best"
    shutil.copytree(checkpoint(), folder)
    with pytest.raises(
        UserError, match=r"someone/x: the hub refused the upload \(PermissionError: 401 Client Error\). Log in"
    ):
        push_to_hub(folder, "someone/x", api=Api(refuses=True))
    (folder / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"README\.md is missing"):
        push_to_hub(folder, "someone/x", api=api)
    (folder / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        push_to_hub(folder, "someone/x", api=api)
    assert api.created == []
