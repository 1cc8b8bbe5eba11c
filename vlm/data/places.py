"""What a place of shards says by its name alone: which tars its braces stand for, and what its source is called where no index says that."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from braceexpand import braceexpand

from vlm.data.remote import is_remote
from vlm.errors import ConfigError, UserError

if TYPE_CHECKING:
    from vlm.data.index import ShardSet

SHARD = "{shard}"  # stands for the shard's name in the root of a remote set
PATTERN = re.compile(r"[^\s/'\"=]+\.tar(?![\w.])")  # the file name, with braces, in a remote location
SPLIT = re.compile(  # a folder that every data set has: train, val2014, test-dev, train_val
    r"((rest|mini)?(train|training|val|valid|validation|test|testing|dev|eval|evaluation|std)[-_]?)+\d*", re.IGNORECASE
)


REVISION = ("main", "resolve")  # of every data set on the hub: OWNER/NAME/resolve/main/...


def expand(pattern: str, place: str) -> list[str]:
    """What a brace pattern stands for. place: all that was given.

    Raises:
        ConfigError: its braces do not come in pairs.
    """
    try:
        return list(braceexpand(pattern))
    except ValueError:  # its UnbalancedBracesError, which its types lack
        raise ConfigError(f"{place}: a brace lacks its other half; expected the form {{00000..00331}}.tar.") from None


def remote_place(text: str) -> tuple[str, str, str, list[str] | None]:
    """The root of an address or command, what stands before and after its pattern, and the names that this gives."""
    found = list(PATTERN.finditer(text))
    if len(found) > 1 or (text.startswith("pipe:") and not found):
        raise UserError(
            f"{text}: expected one file name or brace pattern that ends in .tar, such as {{00000..00331}}.tar."
        )
    before, after, names = text.rstrip("/") + "/", "", None
    if found:
        before, after, names = text[: found[0].start()], text[found[0].end() :], expand(found[0][0], text)
    root = before.rstrip("/") if not after else f"{before}{SHARD}{after}"
    return root, before, after, names


def folder_name(root: str) -> str:
    """That of the folder or remote place, without those above it."""
    return _parts(root)[-1]


def guess_source(root: str) -> str:
    """The folder's name; behind that of the folder above it where it is a split's, which every data set has: `cc12m-train`.

    Images of one name are the same image where the source is the same, so it must not change with the machine: no more of the path is in it.
    """
    *above, name = _parts(root)
    source = name
    while (SPLIT.fullmatch(name) or name in REVISION) and above and above[-1] not in ("", ".", ".."):
        name = above.pop()
        source = f"{name}-{source}"
    return source


def check_source(source: str) -> None:
    """Raises UserError for a name that no source can have."""
    if not source or "/" in source:
        raise UserError(f"source={source!r}; expected a name without '/': it becomes part of every image's identity.")


def check_sources(sets: "Sequence[ShardSet]") -> None:
    """Refuses sets of two places that nobody named and whose folders have one name: different images would count as the same.

    Raises:
        ConfigError: names both places and the mend.
    """
    places: dict[str, str] = {}
    for shards in sets:
        place = shards.root if is_remote(shards.root) else str(Path(shards.root).resolve())
        if shards.guessed and shards.counted and (other := places.setdefault(shards.source, place)) != place:
            raise ConfigError(
                f"{other} and {place}: nobody named their source, and both would be {shards.source!r}, so that images with the same key would be "
                "taken for one. Name each with `vlm shards index FOLDER --source NAME` (the parts of one data set alike; docs/data.md, Sources)."
            )


def _parts(root: str) -> Sequence[str]:
    if is_remote(root):  # of a command the last word
        return root.partition(SHARD)[0].rstrip("/").rsplit(" ", 1)[-1].split("/")
    return str(Path(root).resolve()).split("/")
