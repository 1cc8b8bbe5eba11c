"""Shards on a server that drops connections, stalls, answers with errors and ignores ranges: the batches of the local folder, or a clear stop."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from vlm.config import CacheConfig
from vlm.data.batch import Batch
from vlm.data.index import ShardInfo, ShardSet, load_index
from vlm.data.loader import Loader
from vlm.data.remote import RemoteShard, UnreadableShard
from vlm.data.scan import scan
from vlm.errors import ConfigError, UserError

MakeLoader = Callable[..., Loader]
WriteSet = Callable[..., ShardSet]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Server(ThreadingHTTPServer):
    """Serves the files of `folder` with ranges and tags. `faults[name]` says what happens to the first requests of a file, `always[name]` to all."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ended = folder, threading.Event()
        self.faults: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.waited_for = False  # somebody listened to the end of a drip
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what is tested."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        self.server.asked.append((name, self.headers["Range"]))
        waiting = self.server.faults.get(name)
        fault = self.server.always.get(name) or (waiting.pop(0) if waiting else "")
        file = self.server.folder / name
        if fault.isdecimal() or not file.is_file():
            self.send_response(int(fault or 404))
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        data, start = file.read_bytes(), 0
        if self.headers["Range"] and fault != "ignores ranges":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if fault not in ("cut, length unsaid", "endless"):
            self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hash(data)}"')
        self.end_headers()
        self.send(data[start:], fault)

    def send(self, data: bytes, fault: str) -> None:
        half = 0 if fault == "silent" else len(data) // 2
        self.wfile.write(data if fault in ("", "ignores ranges", "endless") else data[:half])
        while fault == "endless":
            self.wfile.write(data)
        if fault in ("stalls", "silent"):
            self.server.ended.wait(20)
        if fault == "slow":
            time.sleep(0.2)
            self.wfile.write(data[half:])
        for i in range(half, half + 100 if fault == "drips" else half):
            self.server.ended.wait(0.05)
            self.wfile.write(data[i : i + 1])
        self.server.waited_for |= fault == "drips"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serves tmp_path/toy, where `write_set()` writes; between attempts nobody waits."""
    monkeypatch.setattr("vlm.data.remote.FIRST_PAUSE", 0.01)
    with Server(tmp_path / "toy") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache"), timeout=1.0, retries=2)


def content(loader: Loader) -> list[tuple[Any, ...]]:
    """Everything of an epoch's batches."""

    def one(b: Batch) -> tuple[Any, ...]:
        assert b.masked is not None
        texts = (b.texts.ids.tolist(), b.texts.weight.tolist(), b.masked.positions.tolist(), b.masked.labels.tolist())
        return b.keys, b.images.tolist(), b.image_ids.tolist(), *texts, b.filled

    return [one(b) for b in loader.iterate(0)]


def copies(cache: CacheConfig) -> dict[str, int]:
    assert cache.folder is not None
    found = list(os.scandir(cache.folder)) if os.path.isdir(cache.folder) else []
    return {e.name: e.stat().st_size for e in found if e.name.endswith((".tar", ".part"))}


FAULTS = ["500", "503", "429", "drops", "stalls", "drips", "cut, length unsaid", "ignores ranges"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_recovers_gives_the_batches_of_the_local_folder(
    write_set: WriteSet,
    make_loader: MakeLoader,
    server: Server,
    cache: CacheConfig,
    fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    local = write_set()
    breaks = ["drops"] if fault == "ignores ranges" else []
    server.faults = {"shard-000001.tar": [*breaks, fault], "shard-000003.tar": [fault]}
    if fault != "cut, length unsaid":  # an index says nothing of its own length
        server.faults["index.json"] = [fault]
    remote = load_index(server.url, replace(cache, retries=10, timeout=0.5 if fault in ("stalls", "drips") else 10))
    assert remote.shards == local.shards
    assert content(make_loader(remote)) == content(make_loader(local))
    # a second epoch, and a run after this one, read the copies
    before = len(server.asked)
    assert content(make_loader(remote)) == content(make_loader(local))
    assert len(server.asked) == before
    assert not server.waited_for
    assert sorted(copies(cache).values()) == sorted(s.bytes for s in local.shards)
    assert "data.cache.gigabytes" not in caplog.text


def test_an_interrupted_download_goes_on_where_it_broke_off(
    write_set: WriteSet, server: Server, cache: CacheConfig
) -> None:
    shard = write_set().shards[0]
    half = shard.bytes // 2
    remote = RemoteShard(f"{server.url}/{shard.name}", shard.bytes, replace(cache, retries=0))
    server.faults = {shard.name: ["drops"]}
    with pytest.raises(UnreadableShard, match=rf"1 attempts failed: it ended after {half} of {shard.bytes} bytes"):
        remote.open()
    server.faults = {shard.name: ["stalls"]}
    killed = multiprocessing.get_context("fork").Process(target=replace(remote, cache=replace(cache, timeout=30)).open)
    killed.start()
    for _ in range(1000):
        if list(copies(cache).values()) == [half + (shard.bytes - half) // 2]:  # half of what was missing
            break
        time.sleep(0.01)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    file = os.fdopen(remote.open(), "rb")
    assert file.read() == (server.folder / shard.name).read_bytes()
    ranges = [r for name, r in server.asked if name == shard.name]
    assert ranges == [None, f"bytes={half}-", f"bytes={half + (shard.bytes - half) // 2}-"]
    assert list(copies(cache).values()) == [shard.bytes]


def test_who_wants_a_shard_that_is_on_its_way_waits_for_it(
    write_set: WriteSet, server: Server, cache: CacheConfig
) -> None:
    shard = write_set().shards[0]
    server.always = {shard.name: "slow"}
    remote = RemoteShard(f"{server.url}/{shard.name}", shard.bytes, cache)
    with ThreadPoolExecutor(4) as pool:  # each has a lock of its own, as processes do
        files = [done.result() for done in [pool.submit(remote.open) for _ in range(4)]]
    assert len(server.asked) == 1
    assert {os.fdopen(file, "rb").read() for file in files} == {(server.folder / shard.name).read_bytes()}


def test_ranks_and_workers_fetch_each_shard_once(
    write_set: WriteSet, make_loader: MakeLoader, server: Server, cache: CacheConfig
) -> None:
    local = write_set(samples=40)
    remote = load_index(server.url, cache)
    parts = [make_loader(remote, world=2, rank=r, workers=2).iterate(0) for r in range(2)]
    keys = [
        key for pair in zip(*parts, strict=True) for keys in zip(*(b.keys for b in pair), strict=True) for key in keys
    ]
    assert keys == [key for batch in make_loader(local).iterate(0) for key in batch.keys]
    asked = Counter(name for name, _ in server.asked)
    assert asked == {"index.json": 1} | {s.name: 1 for s in local.shards}


def test_the_cache_is_bounded_and_others_files_stay(
    write_set: WriteSet,
    make_loader: MakeLoader,
    server: Server,
    cache: CacheConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    local = write_set(samples=60, samples_per_shard=3)
    largest = max(s.bytes for s in local.shards)
    cache = replace(cache, gigabytes=3.5 * largest / 1e9)
    assert cache.folder is not None
    os.mkdir(cache.folder)
    mine = Path(cache.folder) / "mine.tar"
    mine.write_bytes(b"?" * 4 * largest)
    abandoned = Path(cache.folder) / f"{0:032x}.tar.part"
    abandoned.write_bytes(b"?" * largest)
    os.utime(abandoned, (0, 0))
    loader = make_loader(load_index(server.url, cache))
    assert "read shards of about" in caplog.text
    want = content(make_loader(local))
    for i, batch in enumerate(loader.iterate(0)):
        assert batch.keys == want[i][0]
        assert sum(copies(cache).values()) - 4 * largest <= 3.5 * largest
    assert mine.exists()
    assert not abandoned.exists()


@pytest.mark.parametrize(("fault", "attempts"), [("404", 1), ("403", 1), ("500", 3), ("silent", 3), ("endless", 1)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_had_is_bad_samples(
    write_set: WriteSet,
    make_loader: MakeLoader,
    server: Server,
    cache: CacheConfig,
    fault: str,
    attempts: int,
    workers: int,
) -> None:
    local = write_set(samples=24)
    server.always = {"shard-000001.tar": fault}
    loader = make_loader(load_index(server.url, cache), max_bad_fraction=0.5, workers=workers, streams=2)
    batches = content(loader)
    assert dict(loader.bad) == {"unreadable shard": 6}
    assert sum(b[4].count(0.0) for b in batches) == 6
    readers = max(1, workers)
    assert attempts <= Counter(name for name, _ in server.asked)["shard-000001.tar"] <= attempts * readers
    os.unlink(server.folder / "shard-000001.tar")  # one that vanishes from a folder is no other thing
    assert content(make_loader(local, max_bad_fraction=0.5, streams=2)) == batches


def test_beyond_the_share_it_stops_and_names_the_server_s_answer(
    write_set: WriteSet, make_loader: MakeLoader, server: Server, cache: CacheConfig
) -> None:
    write_set(samples=200, samples_per_shard=20)
    remote = load_index(server.url, cache)
    server.always = {f"shard-{i:06d}.tar": "500" for i in range(1, 10)}
    loader = make_loader(remote, streams=2, batch_size=2)
    with pytest.raises(UserError, match=r"90 x unreadable shard.*tar cannot be read, 3 attempts failed: .* 500"):
        list(loader.iterate(0))
    # what is learned from all records must not depend on the weather
    with pytest.raises(UserError, match=r"shard-000001.tar cannot be read, 3 attempts failed: the server answered 500"):
        list(scan([remote]))


def test_what_does_not_fit_is_refused(write_set: WriteSet, server: Server, cache: CacheConfig, tmp_path: Path) -> None:
    shard = write_set().shards[0]
    url = f"{server.url}/{shard.name}"
    with pytest.raises(UnreadableShard, match=rf"it has {shard.bytes} bytes, its index says 7; make the index anew"):
        RemoteShard(url, 7, cache).open()
    tight = replace(cache, gigabytes=1e-6)
    with pytest.raises(ConfigError, match=r"GB, data.cache.gigabytes=1e-06"):
        RemoteShard(url, 0, tight).open()
    server.always = {shard.name: "endless"}
    with pytest.raises(UnreadableShard, match="it sends more than the 1000000 bytes that were expected"):
        RemoteShard(url, 0, replace(cache, gigabytes=1e-3)).open()
    assert not any(copies(cache).values())
    with pytest.raises(ConfigError, match=r"shard-000000.tar of http.* has .* GB, data.cache.gigabytes=1e-06; give"):
        load_index(server.url, tight)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the cache .*file cannot be used: .*data.cache.folder"):
        RemoteShard(url, 0, replace(cache, folder=str(tmp_path / "file"))).open()


def test_a_copy_that_was_cut_is_fetched_again(write_set: WriteSet, server: Server, cache: CacheConfig) -> None:
    shard = write_set().shards[0]
    remote = RemoteShard(f"{server.url}/{shard.name}", shard.bytes, cache)
    os.close(remote.open())
    (name,) = copies(cache)
    assert cache.folder is not None
    os.truncate(f"{cache.folder}/{name}", 100)
    assert os.fdopen(remote.open(), "rb").read() == (server.folder / shard.name).read_bytes()


def test_indexes_of_other_makers(write_set: WriteSet, server: Server, cache: CacheConfig) -> None:
    local = write_set()
    (server.folder / "index.json").unlink()
    place, pattern = f"{server.url}/{{}}?token=1", "shard-{000001..000002}.tar"
    with pytest.raises(UserError, match=r"index.json\?token=1 cannot be read \(the server answered 404"):
        load_index(place.format(pattern), cache)
    want = [ShardInfo(s.name, s.samples, 0) for s in local.shards[1:3]]
    lengths = {s.name: s.samples for s in local.shards}
    info = {"splits": {"train": {"filenames": [*lengths], "shard_lengths": [*lengths.values()]}}}
    (server.folder / "_info.json").write_text(json.dumps(info))
    assert load_index(place.format(pattern), cache).shards == tuple(want)
    (server.folder / "_info.json").unlink()
    for s in local.shards:
        (server.folder / s.name.replace(".tar", "_stats.json")).write_text(json.dumps({"successes": s.samples}))
    found = load_index(place.format(pattern), cache)
    assert found.shards == tuple(want)
    part = ShardSet(local.root, found.source, local.shards[1:3])
    assert list(scan([found])) == list(scan([part]))


def test_a_given_index_names_an_address_but_no_command(
    write_set: WriteSet, server: Server, cache: CacheConfig, tmp_path: Path
) -> None:
    local = write_set()
    given = tmp_path / "given.json"
    index = json.loads((server.folder / "index.json").read_bytes())
    (server.folder / "index.json").unlink()
    given.write_text(json.dumps(index | {"root": server.url}))
    assert list(scan([load_index(given, cache)])) == list(scan([local]))
    for root in (f"pipe:cat {local.root}/{{shard}}", local.root, f"file://{local.root}", None):
        given.write_text(json.dumps(index | {"root": root}))
        with pytest.raises(UserError, match=r'its "root" is .*; expected the address'):
            load_index(given, cache)
    for name in ("../x.tar", "/etc/x.tar", "https://elsewhere/x.tar"):
        index["shards"][0]["name"] = name
        given.write_text(json.dumps(index | {"root": server.url}))
        with pytest.raises(UserError, match="expected a file name"):
            load_index(given, cache)


def test_commands(write_set: WriteSet, make_loader: MakeLoader, server: Server, cache: CacheConfig) -> None:
    local = write_set()
    command = f"pipe:cat {local.root}/{{}} | cat"
    remote = load_index(command.format("shard-{000000..000003}.tar"), cache)
    assert remote.shards == local.shards
    assert content(make_loader(remote, workers=2)) == content(make_loader(local))
    shard = local.shards[0]
    for run, message in [
        (f"head -c 1000 {local.root}/{shard.name}; exit 3", "the command ended with status 3"),
        (f"head -c 1000 {local.root}/{shard.name}", f"it ended after 1000 of {shard.bytes} bytes"),
        ("sleep 77.77 | cat", "nothing came for 1 s"),
    ]:
        with pytest.raises(UnreadableShard, match=f"3 attempts failed: {message}"):
            RemoteShard(f"pipe:{run}", shard.bytes, cache).open()
    for _ in range(200):  # what was killed is there until its new parent has seen it end
        if not (left := [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"77.77" in _read(p)]):
            break
        time.sleep(0.05)
    assert not left
    for text in (f"pipe:cat {local.root}", f"pipe:cat {local.root}/a.tar {local.root}/b.tar"):
        with pytest.raises(UserError, match="expected one file name or brace pattern"):
            load_index(text, cache)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_no_name_of_an_index_reaches_a_shell(write_set: WriteSet, cache: CacheConfig, tmp_path: Path) -> None:
    local = write_set()
    index = json.loads(Path(local.root, "index.json").read_bytes())
    index["shards"].append({"name": f"x;touch {tmp_path.name};.tar", "samples": 1, "bytes": 1})
    Path(local.root, "index.json").write_text(json.dumps(index))
    found = load_index(f"pipe:cat {local.root}/shard-{{000000..000003}}.tar", cache)
    assert found.shards == local.shards


def test_fsspec_addresses(write_set: WriteSet, make_loader: MakeLoader, cache: CacheConfig, server: Server) -> None:
    local = write_set()
    memory = fsspec.filesystem("memory")
    memory.put(f"{local.root}/", "/bucket/toy/", recursive=True)
    try:
        remote = load_index("memory://bucket/toy", cache)
        assert content(make_loader(remote, workers=2)) == content(make_loader(local))
    finally:
        memory.rm("/bucket", recursive=True)
    shutil.rmtree(str(cache.folder))
    with pytest.raises(UnreadableShard, match="it does not exist"):
        RemoteShard("memory://bucket/toy/shard-000000.tar", 1, cache).open()
    with pytest.raises(UserError, match=r"remote shards need one"):
        load_index("nosuch://bucket/toy", cache)
    with pytest.raises(UserError, match=r"pip install 'vlm-fusion\[remote\]'"):
        load_index("s3://bucket/toy", cache)
