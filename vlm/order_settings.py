"""What the settings leave open: the number of streams, and what a run that goes on began with."""

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
    """The settings with the streams and the precision that the run in `out` began with, where they leave these open.

    Before there was a choice, streams were 64.
    """
    import yaml

    try:
        began = yaml.safe_load((out / "config.yaml").read_text())
        streams, precision = began["data"]["streams"], began["train"]["precision"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return config
    if config.data.streams is None and isinstance(streams, int):
        config = replace(config, data=replace(config.data, streams=streams))
    if config.train.precision == "auto":
        config = replace(config, train=replace(config.train, precision=precision))
    return config
