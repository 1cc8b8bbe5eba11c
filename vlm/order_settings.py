"""The number of streams where the settings leave it open, also of a run that goes on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlm.config import Config, DataConfig
from vlm.data.index import ShardSet
from vlm.data.order import automatic_streams
from vlm.data.remote import is_remote


def streams_of(data: DataConfig, sets: Sequence[ShardSet]) -> int:
    """How many streams the epoch's order is cut into, the same for every number of ranks."""
    return data.streams or automatic_streams(data.batch_size, any(is_remote(s.root) for s in sets))


def as_begun(config: Config, out: Path) -> Config:
    """The settings with the streams that the run in `out` began with, where they leave that open: before there was a choice it was 64."""
    import yaml

    try:
        began = yaml.safe_load((out / "config.yaml").read_text())["data"]["streams"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return config
    if config.data.streams is not None or not isinstance(began, int):
        return config
    return replace(config, data=replace(config.data, streams=began))
