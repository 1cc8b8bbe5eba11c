"""What a folder of shards holds: `index.json` lists name, samples and bytes of each tar.

Read from our own, from img2dataset's `*_stats.json`, or counted from the tars' headers at first use.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import webdataset
from braceexpand import braceexpand

from vlm.data.records import scan_shard
from vlm.errors import UserError

log = logging.getLogger(__name__)
REPLACING = "index.replacing"  # marks a folder whose shards are being replaced


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, how many records it holds, its size in bytes."""

    name: str
    samples: int
    bytes: int


@dataclass(frozen=True)
class ShardSet:
    """Shards of one source in one folder (or under one remote prefix)."""

    root: str
    source: str
    shards: tuple[ShardInfo, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def load_index(path: str | Path) -> ShardSet:
    """The shards of a folder, or of a brace pattern of tars such as `cc3m/{00000..00331}.tar`.

    A folder without `index.json` is indexed from img2dataset's `*_stats.json` or the tars' headers, and the index written beside them where that is
    possible. Raises UserError for a missing folder or shard, for an unusable index, and for a remote location without an index.
    """
    text = str(path)
    if "://" in text or text.startswith("pipe:"):
        return _load_remote(text)
    names = None
    folder = Path(path)
    if text.endswith(".tar"):
        files = [Path(p) for p in braceexpand(text)]
        folder, names = files[0].parent, [f.name for f in files]
        if any(f.parent != folder for f in files):
            raise UserError(f"{text} spans several folders; give one pattern for each.")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected shards (*.tar). Make them with datasets/NAME/prepare.py.")
    if (folder / REPLACING).exists():
        raise UserError(
            f"{folder} was being rewritten and that was interrupted; run the command that writes these shards again."
        )
    present = sorted(p.name for p in folder.glob("*.tar"))
    known = _read_index(folder / "index.json") if (folder / "index.json").exists() else None
    if known is None:
        known = write_index(folder) if names is None or set(names) == set(present) else _index_folder(folder, names)
    elif names is None and (extra := sorted(set(present) - {s.name for s in known.shards})):
        raise UserError(
            f"{folder}/index.json does not list {extra[0]} ({len(extra)} such); make it anew with `vlm shards index {folder}`."
        )
    if names is not None:
        listed = {s.name: s for s in known.shards}
        if lost := [n for n in names if n not in listed]:
            raise UserError(
                f"{folder}/index.json does not list {lost[0]} ({len(lost)} such); make it anew with `vlm shards index {folder}`."
            )
        known = ShardSet(known.root, known.source, tuple(listed[n] for n in names))
    if missing := sorted({s.name for s in known.shards} - set(present)):
        raise UserError(
            f"{folder} lacks {missing[0]} ({len(missing)} shards of its index); copy it there or run `vlm shards index {folder}`."
        )
    return known


def write_index(folder: str | Path, source: str | None = None) -> ShardSet:
    """Counts the records of every tar in a local folder and writes `index.json` there (atomically; a read-only folder is left as it is)."""
    folder = Path(folder)
    found = _index_folder(folder, sorted(p.name for p in folder.glob("*.tar")), source)
    try:
        write_json(folder / "index.json", index_content(found.source, found.shards))
    except OSError as error:
        log.warning(
            "%s/index.json cannot be written (%s): the shards will be counted again next time", folder, error.strerror
        )
    return found


def _index_folder(folder: Path, names: Sequence[str], source: str | None = None) -> ShardSet:
    if not names:
        raise UserError(f"{folder} holds no shards (*.tar). Make them with datasets/NAME/prepare.py.")
    shards = []
    for name in names:
        file = folder / name
        if not file.exists():
            raise UserError(f"{file} does not exist; correct the pattern or copy the shard there.")
        shards.append(ShardInfo(name, _count(file), file.stat().st_size))
    return ShardSet(str(folder), source or folder.resolve().name, tuple(shards))


def _count(file: Path) -> int:
    stats = file.with_name(f"{file.stem}_stats.json")
    if stats.exists():
        try:
            return int(json.loads(stats.read_text())["successes"])
        except (ValueError, KeyError, TypeError):
            log.warning("%s cannot be used; counting the records of %s instead", stats, file.name)
    offsets, damage = scan_shard(file)
    if damage:
        log.warning("%s is damaged (%s): its %d whole records are used", file, damage, len(offsets) - 1)
    return len(offsets) - 1


def index_content(source: str, shards: Sequence[ShardInfo]) -> dict[str, Any]:
    return {"source": source, "shards": [asdict(s) for s in shards], "samples": sum(s.samples for s in shards)}


def _read_index(path: Path) -> ShardSet:
    try:
        return _parse_index(str(path.parent), path.read_bytes())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be used ({error}); make it anew with `vlm shards index {path.parent}`."
        ) from None


def _parse_index(root: str, data: bytes) -> ShardSet:
    content = json.loads(data)
    shards = tuple(ShardInfo(str(s["name"]), int(s["samples"]), int(s["bytes"])) for s in content["shards"])
    return ShardSet(root, str(content["source"]), shards)


def _load_remote(text: str) -> ShardSet:
    root = text.rsplit("/", 1)[0] if text.endswith(".tar") else text.rstrip("/")
    try:
        with webdataset.gopen(f"{root}/index.json") as stream:
            known = _parse_index(root, stream.read())
    except Exception as error:  # every transport has exceptions of its own
        how = "make it beside a local copy with `vlm shards index FOLDER` and upload it with the shards"
        raise UserError(f"{root}/index.json cannot be read ({error}); remote shards need one: {how}.") from None
    if text.endswith(".tar"):
        names = {n.rsplit("/", 1)[1] for n in braceexpand(text)}
        known = ShardSet(root, known.source, tuple(s for s in known.shards if s.name in names))
    return known


def write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
