"""What a folder of shards holds: `index.json` lists name, samples and bytes of each tar.

Read from our own; at first use from img2dataset's `*_stats.json`, or counted from the tars' headers. Remote ones are never counted (they would have
to be downloaded), but the public cc3m and cc12m shards' `_info.json` serves there too.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm.config import CacheConfig
from vlm.data.count import count_records, stated_count
from vlm.data.places import PATTERN, SHARD, check_source, expand, folder_name, guess_source, remote_place
from vlm.data.records import Location
from vlm.data.remote import RemoteShard, is_remote, limit, read_small
from vlm.data.transport import Interrupted, Refused
from vlm.errors import ConfigError, UserError
from vlm.files import write_json

log = logging.getLogger(__name__)
REPLACING = "index.replacing"  # marks a folder whose shards are being replaced
MADE_BY = "vlm ShardWriter"
SERVER = "server"  # how the data set's server names predictions (vlm.data.official)
GIVEN = re.compile(
    r"(https?|s3|gs|hf)://"
)  # what an index file may name as its root: no command, no folder of this machine


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, how many records it holds, its size in bytes."""

    name: str
    samples: int
    bytes: int


@dataclass(frozen=True)
class ShardSet:
    """Shards of one source in one folder, or at one remote place: an address, perhaps with {shard} where the shard's name belongs."""

    root: str
    source: str
    shards: tuple[ShardInfo, ...]
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Where copies of remote shards are kept."""
    counted: bool = True
    """Whether the numbers of records are known (`list_shards`)."""
    guessed: bool = False
    """Whether the source is made of the folder's name, and nobody gave it."""

    def locate(self, shard: ShardInfo) -> Location:
        """What `ShardReader.read` finds the shard by."""
        path = self.root.replace(SHARD, shard.name) if SHARD in self.root else f"{self.root}/{shard.name}"
        return RemoteShard(path, shard.bytes, self.cache) if is_remote(self.root) else path

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def load_index(path: str | Path, cache: CacheConfig | None = None) -> ShardSet:
    """The shards of a folder, or of a brace pattern of tars such as `cc3m/{00000..00331}.tar`.

    Both may be at an address (https://, s3://, hf://, ...), the pattern in a command (`pipe:aws s3 cp s3://bucket/cc3m/{00000..00331}.tar -`), and a
    local index file may name an address as its "root".

    A folder without `index.json` is indexed from img2dataset's `*_stats.json` or the tars' headers, and the index written beside them where that is
    possible. cache: where copies of remote shards will be kept. Raises UserError for a missing folder or shard, for an unusable index, and for a
    remote location without an index; ConfigError for an unusable pattern.
    """
    text, cache = str(path), cache or CacheConfig()
    if is_remote(text):
        return _fitting(_load_remote(text, cache))
    if text.endswith(".json"):
        return _fitting(_load_given(Path(path), cache))
    names = None
    folder = Path(path)
    if text.endswith(".tar") and not folder.is_dir():
        files = [Path(p) for p in expand(text, text)]
        folder, names = files[0].parent, [f.name for f in files]
        if any(f.parent != folder for f in files):
            raise UserError(f"{text} spans several folders; give one pattern for each.")
        _once(names, text)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected shards (*.tar). Make them with datasets/NAME/prepare.py.")
    if (folder / REPLACING).exists():
        raise UserError(
            f"{folder} was being rewritten and that was interrupted; run the command that writes these shards again."
        )
    present = sorted(p.name for p in folder.glob("*.tar"))
    known = _read_index(folder / "index.json") if (folder / "index.json").exists() else None
    if known is None:
        part = None if names is None or set(names) == set(present) else names
        known = _kept(_index_folder(folder, present)) if part is None else _index_folder(folder, part)
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
        known = replace(known, shards=tuple(listed[n] for n in names))
    if missing := sorted({s.name for s in known.shards} - set(present)):
        raise UserError(
            f"{folder} lacks {missing[0]} ({len(missing)} shards of its index); copy it there or run `vlm shards index {folder}`."
        )
    _warn_of_changed(folder, known.shards)
    return known


def _warn_of_changed(folder: Path, shards: Sequence[ShardInfo]) -> None:
    """Says which tars have another size than when they were counted: of one that has grown, nothing else tells that its new records are not read."""
    changed = [s.name for s in shards if s.bytes and (folder / s.name).stat().st_size != s.bytes]
    if changed:
        log.warning(
            "%s: %s (%d such) has another size than its index.json says: it was changed after it was counted, and records beyond those counted then "
            "are not read. `vlm shards index %s` counts anew.",
            *(folder, changed[0], len(changed), folder),
        )


def list_shards(path: str | Path, cache: CacheConfig | None = None) -> ShardSet:
    """As `load_index`; but the shards of a remote brace pattern are taken as it names them, not counted, and no index is looked for."""
    text = str(path)
    names = _once([n for found in PATTERN.findall(text) for n in expand(found, text)], text) if is_remote(text) else []
    if not names:
        return load_index(path, cache)
    root, shards = remote_place(text)[0], tuple(ShardInfo(n, 0, 0) for n in names)
    return ShardSet(root, guess_source(root), shards, cache or CacheConfig(), counted=False, guessed=True)


def write_index(folder: str | Path, source: str | None = None) -> ShardSet:
    """Counts the records of every tar in a local folder and writes `index.json` there (atomically).

    The source stays what it was where none is given, and the tars stay ShardWriter's, if it wrote them all. Raises UserError where the folder holds
    no shards or cannot be written, and for a name that no source can have.
    """
    folder = Path(folder)
    if source is not None:
        check_source(source)
    present = sorted(p.name for p in folder.glob("*.tar"))
    ours = is_ours(folder, present)
    found = _index_folder(folder, present, anew=True)
    kept: dict[str, Any] = {}
    try:
        content = (folder / "index.json").read_bytes()
        before = _parse_index(found.root, content)
        kept = {key: value for key, value in json.loads(content).items() if key == SERVER}
        found = replace(found, source=before.source, guessed=before.guessed)
    except (OSError, ValueError, KeyError, TypeError):
        before = found  # none, or one that cannot be used: it is made anew for that reason
    if source is not None:
        found = replace(found, source=source, guessed=False)
    _write(found, kept | ({"made_by": MADE_BY} if ours else {}))
    if found.source != before.source:
        log.warning(
            "%s: its source was %s and is %s now, so its images have other identities: what a checkpoint saw of them before is not found any more.",
            *(folder, before.source, found.source),
        )
    return found


def is_ours(folder: Path, tars: Sequence[str]) -> bool:
    """Whether ShardWriter wrote all of these and may replace them; an index alone does not say so, as foreign shards get one at first use."""
    try:
        content = json.loads((folder / "index.json").read_bytes())
        return content["made_by"] == MADE_BY and {s["name"] for s in content["shards"]} >= set(tars)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _kept(found: ShardSet) -> ShardSet:
    """The same, written beside the shards; a folder that cannot be written is left as it is."""
    try:
        _write(found, {})
    except UserError as error:
        log.warning("%s The shards will be counted again next time.", error)
    return found


def _write(found: ShardSet, more: dict[str, Any]) -> None:
    content = index_content(found.source, found.shards) | {"source_guessed": found.guessed} | more
    write_json(Path(found.root) / "index.json", content)


def _index_folder(folder: Path, names: Sequence[str], anew: bool = False) -> ShardSet:
    """Of these tars. anew: by their headers, whatever is written beside them."""
    if not names:
        raise UserError(f"{folder} holds no shards (*.tar). Make them with datasets/NAME/prepare.py.")
    shards = []
    for name in names:
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is no file; correct the pattern or copy the shard there.")
        stated = None if anew else stated_count(file)
        shards.append(ShardInfo(name, count_records(file) if stated is None else stated, file.stat().st_size))
    return ShardSet(str(folder), guess_source(str(folder)), tuple(shards), guessed=True)


def _once(names: list[str], text: str) -> list[str]:
    """The shards that a pattern names. Raises ConfigError where one would be read twice."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"{text} names {twice[0]} twice, so its records would be read twice; name each shard once.")
    return names


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
    shards = tuple(_shard_info(s["name"], s["samples"], s["bytes"]) for s in content["shards"])
    source = str(content["source"])
    # one that does not say was perhaps made at the first use by an earlier release, which took the folder's name
    unsaid = "made_by" not in content and source == folder_name(root)
    return ShardSet(root, source, shards, guessed=bool(content.get("source_guessed", unsaid)))


def _shard_info(name: Any, samples: Any, size: Any) -> ShardInfo:
    """Of what somebody wrote: a name that leads nowhere else, and counts that are counts. Raises ValueError."""
    info = ShardInfo(str(name), int(samples), int(size))
    if "/" in info.name or info.samples < 0 or info.bytes < 0:
        raise ValueError(f"{info}: expected a file name, and numbers from 0 on")
    return info


def _load_given(path: Path, cache: CacheConfig) -> ShardSet:
    known = _read_index(path)
    root = json.loads(path.read_bytes()).get("root")
    if not isinstance(root, str) or not GIVEN.match(root):
        raise UserError(
            f'{path}: its "root" is {root!r}; expected the address of the shards, http(s)://, s3://, gs:// or hf://, or give their folder.'
        )
    return replace(known, root=root.rstrip("/"), cache=cache)


def _load_remote(text: str, cache: CacheConfig) -> ShardSet:
    """The shards of an address or command. Names that are read from it are used in addresses only: a command takes those of its own pattern."""
    root, before, after, names = remote_place(text)
    _once(names or [], text)
    try:
        known = _remote_index(before, after, root, names, cache)
    except (Refused, Interrupted, ValueError, KeyError, TypeError) as error:
        how = "make it beside a local copy with `vlm shards index FOLDER` and upload it with the shards"
        raise UserError(f"{before}index.json{after} cannot be read ({error}); remote shards need one: {how}.") from None
    if names is not None:
        listed = {s.name: s for s in known.shards}
        if lost := [n for n in names if n not in listed]:
            raise UserError(
                f"{before}index.json{after} does not list {lost[0]} ({len(lost)} such); correct the pattern or make it anew."
            )
        known = replace(known, shards=tuple(listed[n] for n in names))
    return replace(known, cache=cache)


def _remote_index(before: str, after: str, root: str, names: list[str] | None, cache: CacheConfig) -> ShardSet:
    try:
        return _parse_index(root, read_small(f"{before}index.json{after}", cache))
    except (Refused, Interrupted) as error:
        if names is None or (isinstance(error, Interrupted) and not before.startswith("pipe:")):
            raise
        for read in (_hub_info, _stats):
            try:
                return ShardSet(root, guess_source(root), tuple(read(before, after, names, cache)), guessed=True)
            except (Refused, Interrupted, ValueError, KeyError, TypeError):
                continue
        raise


def _hub_info(before: str, after: str, names: list[str], cache: CacheConfig) -> Iterator[ShardInfo]:
    """From the `_info.json` that the public cc3m and cc12m shards on the hub come with: names and lengths by split."""
    splits = json.loads(read_small(f"{before}_info.json{after}", cache))["splits"]
    lengths = {n: k for s in splits.values() for n, k in zip(s["filenames"], s["shard_lengths"], strict=True)}
    for name in names:
        yield _shard_info(name, lengths[name], 0)


def _stats(before: str, after: str, names: list[str], cache: CacheConfig) -> Iterator[ShardInfo]:
    """From img2dataset's NAME_stats.json of each shard."""

    def read(name: str) -> ShardInfo:
        content = read_small(f"{before}{name.removesuffix('.tar')}_stats.json{after}", cache)
        return _shard_info(name, json.loads(content)["successes"], 0)

    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(read, names)


def _fitting(shards: ShardSet) -> ShardSet:
    """The set, if the cache can hold any one of its shards."""
    if not shards.shards:
        raise UserError(f"{shards.root}: its index lists no shards.")
    largest = max(shards.shards, key=lambda s: s.bytes)
    if largest.bytes > limit(shards.cache):
        raise ConfigError(
            f"{largest.name} of {shards.root} has {largest.bytes / 1e9:.3g} GB, data.cache.gigabytes={shards.cache.gigabytes:g}; "
            "give the cache room for at least one shard a stream (data.streams)."
        )
    return shards
