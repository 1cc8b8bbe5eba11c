"""A shard that changes on its server, or comes in an odd form: the copy is one content, whole, and that of now; else it is not kept."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vlm.config import CacheConfig
from vlm.data.index import ShardInfo, ShardSet
from vlm.data.records import ShardReader
from vlm.data.remote import RemoteShard, UnreadableShard

WriteSet = Callable[..., ShardSet]
OLD, NEW = "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT"


@dataclass
class Answer:
    """How a request is answered. cut: after how many bytes it breaks off; lies: with the rest from another content, whatever If-Range asks for."""

    data: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    status: int = 200
    length: bool = True
    lies: bool = False
    granted: str | None = None


class Server(ThreadingHTTPServer):
    """Gives `answers` in turn, the last of them again and again, and keeps what was asked for: path, Range, If-Range."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = []
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what is tested."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted, condition = self.headers["Range"], self.headers["If-Range"]
        self.server.asked.append((self.path, wanted, condition))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        holds = answer.lies or condition in (None, answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
        start = int(wanted[6:-1]) if wanted and holds and answer.status in (200, 206) else 0
        self.send_response(206 if start else answer.status)
        if start and answer.granted != "":
            self.send_header(
                "Content-Range", answer.granted or f"bytes {start}-{len(answer.data) - 1}/{len(answer.data)}"
            )
        if answer.length:
            self.send_header("Content-Length", str(len(answer.data) - start))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.data[start : None if answer.cut is None else start + answer.cut])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Between attempts nobody waits."""
    monkeypatch.setattr("vlm.data.remote.FIRST_PAUSE", 0.0)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache"), timeout=5.0, retries=2)


@pytest.fixture
def contents(write_tar: Callable[..., None], tmp_path: Path) -> tuple[bytes, bytes]:
    """Two shards of equal length, each of six records, whose bytes differ in the image and text of every one."""
    for letter in "AB":
        members = {f"k{i}.{e}": letter.encode() * 3000 for i in range(6) for e in ("jpg", "txt")}
        write_tar(tmp_path / f"{letter}.tar", members)
    first, second = ((tmp_path / f"{letter}.tar").read_bytes() for letter in "AB")
    assert len(first) == len(second)
    return first, second


def content(shard: RemoteShard) -> bytes:
    with os.fdopen(shard.open(), "rb") as file:
        return file.read()


def later_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on it is as in a process that starts now."""
    monkeypatch.setattr("vlm.data.remote.STARTED", time.time())


VALIDATORS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "strong": ({"ETag": '"a"'}, {"ETag": '"b"'}),
    "weak": ({"ETag": 'W/"a"'}, {"ETag": 'W/"b"'}),
    "date": ({"Last-Modified": OLD}, {"Last-Modified": NEW}),
    "weak, equal, and date": (
        {"ETag": 'W/"a"', "Last-Modified": OLD},
        {"ETag": 'W/"a"', "Last-Modified": NEW},
    ),
    "none": ({}, {}),
}


@pytest.mark.parametrize("lies", [False, True], ids=["", "If-Range ignored"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("known", [False, True], ids=["size unknown", "size known"])
@pytest.mark.parametrize("validator", VALIDATORS)
def test_what_changed_after_a_break_is_not_joined_to_what_came_before(
    server: Server,
    cache: CacheConfig,
    contents: tuple[bytes, bytes],
    validator: str,
    known: bool,
    processes: int,
    lies: bool,
) -> None:
    (first, second), (before, after) = contents, VALIDATORS[validator]
    server.answers = [Answer(first, before, cut=len(first) // 2), Answer(second, after, lies=lies)]
    shard = RemoteShard(f"{server.url}/x.tar", len(first) * known, replace(cache, retries=0 if processes == 2 else 2))
    if processes == 2:
        with pytest.raises(UnreadableShard, match="1 attempts failed: it ended after"):
            shard.open()
    assert content(shard) == second


@pytest.mark.parametrize("known", [False, True], ids=["size unknown", "size known"])
@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        ({"ETag": '"a"', "Last-Modified": OLD}, '"a"'),
        ({"ETag": 'W/"a"', "Last-Modified": OLD}, OLD),
        ({"Last-Modified": OLD}, OLD),
        ({"ETag": 'W/"a"'}, None),
        ({"Last-Modified": format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)}, None),
        ({}, None),
    ],
)
def test_the_rest_is_asked_for_on_condition_that_the_file_is_the_same(
    server: Server,
    cache: CacheConfig,
    contents: tuple[bytes, bytes],
    headers: dict[str, str],
    condition: str | None,
    known: bool,
) -> None:
    """A date of this moment is no condition: within its second the file may change once more."""
    data, half = contents[0], len(contents[0]) // 2
    server.answers = [Answer(data, headers, cut=half), Answer(data, headers)]
    assert content(RemoteShard(f"{server.url}/x.tar", len(data) * known, cache)) == data
    assert server.asked[1][1:] == (f"bytes={half}-" if condition else None, condition)


@pytest.mark.parametrize(
    ("status", "granted"),
    [(206, "bytes 1-99/100"), (206, ""), (206, "bytes {half}-{last}/{more}"), (416, None)],
    ids=["another range", "no range", "another total", "416"],
)
def test_an_answer_that_does_not_fit_what_is_there_is_asked_for_from_the_beginning(
    server: Server, cache: CacheConfig, contents: tuple[bytes, bytes], status: int, granted: str | None
) -> None:
    """Without losing an attempt."""
    (first, second), tag = contents, {"ETag": '"a"'}
    half, last = len(first) // 2, len(first) - 1
    odd = granted and granted.format(half=half, last=last, more=last + 2)
    server.answers = [
        Answer(first, tag, cut=half),
        Answer(second, tag, status=status, granted=odd),
        Answer(second, tag),
    ]
    assert content(RemoteShard(f"{server.url}/x.tar", 0, replace(cache, retries=1))) == second
    assert [wanted for _, wanted, _ in server.asked] == [None, f"bytes={half}-", None]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_part_of_which_nobody_knows_the_version_is_fetched_anew(
    server: Server, cache: CacheConfig, contents: tuple[bytes, bytes], share: float
) -> None:
    (first, second), folder = contents, Path(str(cache.folder))
    server.answers = [Answer(second, {"ETag": '"b"'})]
    shard = RemoteShard(f"{server.url}/x.tar", len(second), cache)
    folder.mkdir()
    (folder / f"{shard.digest}.tar.part").write_bytes(first[: int(len(first) * share)])
    assert content(shard) == second


ODD: dict[str, Callable[[bytes], Answer]] = {
    "cut": lambda data: Answer(data[:-9000], length=False),
    "page": lambda data: Answer(b"<html>login</html>"),
    "empty": lambda data: Answer(b""),
    "204": lambda data: Answer(b"", status=204, length=False),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_whole_shard_is_not_kept(
    server: Server,
    cache: CacheConfig,
    contents: tuple[bytes, bytes],
    odd: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where the size is not known before. Of one that never comes better the first records are read, in that run."""
    data = contents[0]
    url = f"{server.url}/x.tar"
    server.answers = [ODD[odd](data), Answer(data)]
    assert content(RemoteShard(url, 0, replace(cache, folder=f"{cache.folder}2"))) == data
    server.answers, server.asked = [ODD[odd](data)], []
    reader, shard = ShardReader(), RemoteShard(url, 0, cache)
    if odd == "cut":
        assert reader.read(shard, "s", 3).captions == ["A" * 3000]
        assert reader.count(shard) < 6
        assert "is damaged (unexpected end of data" in caplog.text
    else:
        with pytest.raises(
            UnreadableShard,
            match=f"3 attempts failed: .*{'without a file' if odd == '204' else 'bytes came that are no tar'}",
        ):
            shard.open()
    assert len(server.asked) == 3
    if odd == "cut":  # while nobody answers, it is better than nothing
        server.answers = [Answer(b"", status=503)]
        later_run(monkeypatch)
        assert ShardReader().count(shard) == reader.count(shard)
        assert "cannot be asked after" in caplog.text
    server.answers = [Answer(data)]
    later_run(monkeypatch)
    assert content(shard) == data


def test_a_command_that_ends_well_in_the_middle_is_not_kept(
    cache: CacheConfig, contents: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = RemoteShard(f"pipe:head -c $(cat {tmp_path}/n) {tmp_path}/A.tar", 0, replace(cache, retries=0))
    (tmp_path / "n").write_text("20000")
    assert content(shard) == contents[0][:20000]
    (tmp_path / "n").write_text("1000000")
    assert len(content(shard)) == 20000
    later_run(monkeypatch)
    assert content(shard) == contents[0]


@pytest.mark.parametrize("known", [False, True], ids=["size unknown", "size known"])
def test_an_encoding_that_nobody_asked_for_is_told(
    server: Server, cache: CacheConfig, contents: tuple[bytes, bytes], known: bool
) -> None:
    server.answers = [Answer(contents[0], {"Content-Encoding": "gzip"})]
    with pytest.raises(UnreadableShard, match=r"Content-Encoding 'gzip', though 'identity' was asked for.*as it is"):
        RemoteShard(f"{server.url}/x.tar", len(contents[0]) * known, cache).open()
    assert len(server.asked) == 1


@pytest.mark.parametrize("validator", VALIDATORS)
def test_a_run_asks_once_whether_a_copy_of_unknown_size_still_holds(
    server: Server,
    cache: CacheConfig,
    contents: tuple[bytes, bytes],
    validator: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (first, second), (before, after) = contents, VALIDATORS[validator]
    if validator == "none":  # then the length tells, here by more of the zeros that end a tar
        second += bytes(512)
    shard = RemoteShard(f"{server.url}/x.tar", 0, cache)
    server.answers = [Answer(first, before)]
    assert content(shard) == first
    later_run(monkeypatch)
    assert [content(shard), content(shard)] == [first, first]
    wanted = f"bytes={len(first) - 1}-" if validator not in ("none", "weak") else None  # where possible one byte
    assert [wanted for _, wanted, _ in server.asked] == [None, wanted]
    server.answers = [Answer(second, after)]
    assert content(shard) == first
    later_run(monkeypatch)
    assert content(shard) == second
    assert len(server.asked) == 4
    server.answers = [Answer(status=404)]
    assert content(shard) == second
    later_run(monkeypatch)
    assert [content(shard), content(shard)] == [second, second]
    assert caplog.text.count("its copy in the cache is read") == 1


def test_a_copy_is_asked_after_by_many_at_once(
    server: Server, cache: CacheConfig, contents: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = RemoteShard(f"{server.url}/x.tar", 0, cache)
    server.answers = [Answer(contents[0], {"ETag": '"a"'})]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            later_run(monkeypatch)
            assert set(pool.map(content, [shard] * 8)) == {contents[0]}
    assert {file.suffix for file in Path(str(cache.folder)).iterdir()} == {".tar", ".json"}


def test_attempts_that_bring_something_new_are_not_counted(
    server: Server, cache: CacheConfig, contents: tuple[bytes, bytes]
) -> None:
    data, tag = contents[0], {"ETag": '"a"'}
    shard = RemoteShard(f"{server.url}/x.tar", len(data), replace(cache, retries=1))
    server.answers = [Answer(data, tag, cut=len(data) // 20)]
    assert content(shard) == data
    assert len(server.asked) >= 20


def test_attempts_that_come_no_further_are_counted(
    server: Server, cache: CacheConfig, contents: tuple[bytes, bytes]
) -> None:
    """So also where each begins anew, as nothing says that the file is the same."""
    server.answers = [Answer(contents[0], cut=9000)]
    with pytest.raises(UnreadableShard, match="3 attempts failed: it ended after 9000"):
        RemoteShard(f"{server.url}/x.tar", len(contents[0]), cache).open()
    assert len(server.asked) == 3


@pytest.mark.parametrize("name", ["a b.tar", "ü.tar", "a#1.tar", "100%25.tar", "a+b.tar"])
def test_names_that_no_address_may_hold_are_quoted(
    server: Server, cache: CacheConfig, contents: tuple[bytes, bytes], name: str
) -> None:
    server.answers = [Answer(contents[0])]
    info = ShardInfo(name, 6, len(contents[0]))
    shard = ShardSet(f"{server.url}/my set", "s", (info,), cache).locate(info)
    assert isinstance(shard, RemoteShard)
    assert content(shard) == contents[0]
    quoted = {"a b.tar": "a%20b.tar", "ü.tar": "%C3%BC.tar", "a#1.tar": "a%231.tar"}.get(name, name)
    assert server.asked[0][0] == f"/my%20set/{quoted}"


@pytest.mark.parametrize(
    ("after", "pause"),
    [
        ("30", (30, 30)),
        ("999", (60, 60)),
        (40, (9, 40)),
        (999, (60, 60)),
        (-9, (0, 0)),
        ("²", (0, 0)),
        ("soon", (0, 0)),
    ],
)
def test_retry_after_is_heeded_up_to_the_timeout(
    server: Server,
    cache: CacheConfig,
    contents: tuple[bytes, bytes],
    after: str | int,
    pause: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """after: seconds as text, or as a number those from now to the HTTP date that is said."""
    cache = replace(cache, timeout=60.0)
    said = after
    if isinstance(after, int):
        said = format_datetime(datetime.now(UTC) + timedelta(seconds=after), usegmt=True)
    pauses: list[float] = []
    monkeypatch.setattr("vlm.data.remote.time", SimpleNamespace(sleep=pauses.append, time=time.time))
    server.answers = [Answer(status=503, headers={"Retry-After": str(said)}), Answer(contents[0])]
    assert content(RemoteShard(f"{server.url}/x.tar", 0, cache)) == contents[0]
    assert len(pauses) == 1
    assert pause[0] <= pauses[0] <= pause[1]


class Breaking(MemoryFileSystem):  # type: ignore[misc]
    """Files in memory with a tag (none where "untagged" is in the name); `after` reads of any file something happens."""

    protocol = "breaking"
    tag, happens, after = "a", staticmethod(lambda: None), 0
    begun: list[int]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("breaking://")))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return super().info(path, **kwargs) | ({} if "untagged" in path else {"ETag": type(self).tag})

    def open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        file, reads = super().open(path, *args, **kwargs), []

        def read(size: int) -> bytes:
            if not reads:
                Breaking.begun.append(file.tell())
            reads.append(size)
            if len(reads) > Breaking.after:
                Breaking.happens()
            return bytes(type(file).read(file, size))

        return SimpleNamespace(read=read, seek=file.seek, close=lambda: None)


@pytest.mark.parametrize(
    ("name", "changes", "breaks"),
    [
        ("tagged", False, False),
        ("tagged", True, False),
        ("tagged", False, True),
        ("tagged", True, True),
        ("untagged", False, False),
        ("untagged", False, True),
        ("untagged", True, True),  # changed without a break, nothing tells of it
    ],
)
def test_a_file_of_fsspec_goes_on_only_while_its_tag_is_the_same(
    cache: CacheConfig,
    contents: tuple[bytes, bytes],
    name: str,
    changes: bool,
    breaks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Broken off or not; what changes while it is read, in several requests, is read again."""
    monkeypatch.setattr("vlm.data.remote.FIRST_PAUSE", 0.0)
    monkeypatch.setattr("vlm.data.transport.CHUNK", 8192)
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    (first, second), system = contents, fsspec.filesystem("breaking")
    path = f"/{name}.tar"
    system.pipe(path, first)

    def happens() -> None:
        Breaking.happens = staticmethod(lambda: None)
        if changes:
            system.pipe(path, second)
            Breaking.tag = "b"
        if breaks:
            raise OSError("broken off")

    Breaking.tag, Breaking.happens, Breaking.after, Breaking.begun = "a", staticmethod(happens), 2, []
    try:
        want = second if changes else first
        assert content(RemoteShard(f"breaking:/{path}", len(first), cache)) == want
    finally:
        system.rm(path)
    goes_on = 16384 if name == "tagged" and not changes else 0
    assert Breaking.begun == ([0, goes_on] if breaks or changes else [0])


def test_a_file_of_this_machine_is_told_by_its_time(
    cache: CacheConfig, contents: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = RemoteShard(f"file://{tmp_path}/A.tar", 0, cache)
    assert content(shard) == contents[0]
    (tmp_path / "A.tar").write_bytes(contents[1])
    os.utime(tmp_path / "A.tar", (9, 9))
    assert content(shard) == contents[0]
    later_run(monkeypatch)
    assert content(shard) == contents[1]
