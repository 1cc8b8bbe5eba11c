"""YAML files and command-line overrides into a checked `Config`, and back into YAML."""

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vlm.config import Config
from vlm.errors import ConfigError
from vlm.settings_check import check


def load_config(path: str | Path, overrides: Sequence[str] = (), program: str = "vlm train") -> Config:
    """The settings of `path`, on top of its `base:` file if it names one, with `--key value` overrides.

    `--help` among the overrides prints every setting with its meaning and present value and leaves.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (the nearest known one is named), or a value does not fit.
    """
    config = config_from_dict(_read_with_base(Path(path)), str(path))
    if overrides:
        import tyro

        form = (tyro.conf.FlagConversionOff,)  # every setting is --key value, those of yes or no too
        config = tyro.cli(Config, default=config, args=list(overrides), prog=f"{program} {path}", config=form)
    check(config)
    return config


def config_from_dict(values: dict[str, Any], source: str) -> Config:
    """A `Config` from nested dictionaries; `source` is named in errors."""
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown_keys(values, Config, source)
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        said = _list_wanted(first["input"]) if first["type"] == "tuple_type" else first["msg"]
        raise ConfigError(f"{source}: {key} = {first['input']!r}: {said}.") from None


def config_to_yaml(config: Config) -> str:
    """YAML that `load_config` reads back to an equal `Config`."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in one mapping, which YAML forbids and PyYAML lets pass: the first would be lost unsaid."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Looked at here, and not where values are made: there merge keys (`<<`) have brought in what may well be given again."""
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in first:
                raise ConfigError(
                    f"{self.name}: line {line}: {key.value} is given again, first in line {first[name]}; only one would count: make them one."
                )
            first[name] = line
        return node


def _read_with_base(path: Path) -> dict[str, Any]:
    values = _read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    below = _read_yaml(path.parent / str(base))
    if "base" in below:
        raise ConfigError(f"{path}: base {base} has a base of its own; one level is allowed.")
    return _merge(below, values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open() as file:
            values = yaml.load(file, _Loader)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = (
            f" Did you mean {path.parent / near[0]}?"
            if near
            else " Configs lie in configs/pretrain and configs/finetune."
        )
        raise ConfigError(f"{path}: no such config file.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings as `key: value`, got {type(values).__name__}.")
    return values


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _refuse_unknown_keys(values: dict[str, Any], kind: Any, source: str, prefix: str = "") -> None:
    types = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in types:
            hint = _nearest(str(key), types, prefix) or f"known here: {', '.join(types)}."
            raise ConfigError(f"{source}: unknown setting {prefix}{key}; {hint}")
        if dataclasses.is_dataclass(types[key]) and isinstance(value, dict):
            _refuse_unknown_keys(value, types[key], source, f"{prefix}{key}.")


def _list_wanted(given: Any) -> str:
    """What pydantic calls a tuple, which YAML does not have."""
    return f"expected a list, e.g. [{given}]" if isinstance(given, str) else "expected a list"


def _nearest(key: str, types: dict[str, Any], prefix: str) -> str:
    """Which setting was meant, if one is like it: of this very name anywhere, or of a similar one at this place."""
    found = [name for name in _all_keys(Config) if name.split(".")[-1] == key.split(".")[-1]]
    if not found:
        found = [f"{prefix}{near}" for near in difflib.get_close_matches(key, types, n=1, cutoff=0.5)]
    return f"did you mean {' or '.join(found)}?" if found else ""


def _all_keys(kind: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, inner in typing.get_type_hints(kind).items():
        keys.append(f"{prefix}{name}")
        if dataclasses.is_dataclass(inner):
            keys += _all_keys(inner, f"{prefix}{name}.")
    return keys


def _plain(value: Any) -> Any:
    """Tuples as lists, as YAML has no tuples."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
