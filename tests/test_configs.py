"""Every config of the repository is one that can be used."""

from pathlib import Path

import pytest

from vlm.settings import config_from_dict, config_to_yaml, load_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_there_are_configs() -> None:
    assert len(CONFIGS) > 0
    assert {path.parent.name for path in CONFIGS} >= {"pretrain", "captioning", "vqa", "retrieval"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_it_loads_and_says_what_it_trains(path: Path) -> None:
    import yaml

    config = load_config(path)
    folder = path.relative_to(ROOT / "configs").parts
    # Retrieval is fine-tuned by pretraining's objectives.
    assert config.task == ("pretraining" if folder[0] == "pretrain" or folder[1] == "retrieval" else folder[1])
    assert config.data.splits.train
    assert config.data.splits.val
    assert config.out.startswith("runs/")
    assert path.read_text().startswith("#"), "a config begins with what it is for"
    assert config_from_dict(yaml.safe_load(config_to_yaml(config)), "again") == config


def test_no_two_configs_write_into_one_folder() -> None:
    outs = [load_config(path).out for path in CONFIGS]
    assert len(outs) == len(set(outs))
