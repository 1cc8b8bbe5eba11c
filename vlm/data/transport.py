"""Bytes from elsewhere: http(s), the output of a command (`pipe:`), or whatever fsspec opens (s3, gs, hf, ...), read so that nothing can hang.

`receive` reads in a thread of its own and gives up where nothing comes in time, so that one rule serves every protocol, whatever its library does.
"""

import http.client
import os
import queue
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlsplit

from vlm.data.versions import Version

CHUNK = 2**18
SLOWEST = 1024  # bytes a second, over a whole timeout; a server that drips more slowly has stalled
IN_URLS = "!$%&'()*+,/:;=?@[]~"  # beside letters, digits and -._, all that an address may hold as it is
CHANGES = (
    "ETag",
    "etag",
    "generation",
    "blob_id",
    "LastModified",
    "last_modified",
    "mtime",
)  # with the content of a file, in the words of fsspec's systems


class Refused(Exception):
    """The other side said no (not found, not allowed, unknown protocol): asking again is of no use."""


class Interrupted(Exception):
    """It broke off, or did not answer well: worth another attempt, after `wait` seconds if the other side said so."""

    def __init__(self, message: str, wait: float = 0.0, restart: bool = False) -> None:
        super().__init__(message)
        self.wait, self.restart = wait, restart


@dataclass(frozen=True)
class Head:
    """What is known before the bytes: the number of the first that comes (0 where a range was not granted), and of what version they are."""

    start: int
    version: Version


@dataclass
class _Opened:
    head: Head
    read: Callable[[], bytes]
    """The next bytes, empty at the end; raises Interrupted where the end came too early."""
    close: Callable[[], object]
    abort: Callable[[], object] = lambda: None
    """Ends a read that hangs in another thread, where that needs doing."""


def receive(url: str, start: int, version: Version, timeout: float) -> Generator[Head | bytes, None, None]:
    """The head of `url`, then its bytes, from number `start` on where the other side can do that.

    version: of the bytes before `start`; unless what is there now is surely of that version, it comes from its beginning. Raises Refused or
    Interrupted, the latter also where for `timeout` seconds nothing comes, or less than a kibibyte a second.
    """
    items: queue.Queue[Head | bytes | Exception | None] = queue.Queue(maxsize=8)
    given_up = threading.Event()
    opened: list[_Opened] = []

    def put(item: Head | bytes | Exception | None) -> None:
        while not given_up.is_set():
            try:
                items.put(item, timeout=0.5)
                break
            except queue.Full:
                continue

    def pump() -> None:
        try:
            source = _open(url, start, version, timeout)
            opened.append(source)
            with closing(source):
                put(source.head)
                while not given_up.is_set() and (data := source.read()):
                    put(data)
            put(None)
        except Exception as error:  # told to the reader, whatever it is
            put(error)

    threading.Thread(target=pump, daemon=True).start()
    try:
        since, received = time.monotonic(), 0
        while (item := _next(items, timeout)) is not None:
            if isinstance(item, Exception):
                raise _told(item)
            yield item
            received += len(item) if isinstance(item, bytes) else 0
            if (now := time.monotonic()) - since > timeout:
                if received < SLOWEST * timeout:
                    raise Interrupted(f"only {received} bytes came in {timeout:g} s")
                since, received = now, 0
    finally:
        given_up.set()
        for source in opened:
            source.abort()


def _next(items: "queue.Queue[Head | bytes | Exception | None]", timeout: float) -> Head | bytes | Exception | None:
    try:
        return items.get(timeout=timeout)
    except queue.Empty:
        raise Interrupted(f"nothing came for {timeout:g} s") from None


def _told(error: Exception) -> Exception:
    """Every library has exceptions of its own: these are for good, the rest may pass."""
    if isinstance(error, Refused | Interrupted):
        return error
    if isinstance(error, FileNotFoundError):
        return Refused("it does not exist")
    if isinstance(error, PermissionError):
        return Refused(f"no permission ({error})")
    if isinstance(error, ImportError):
        return Refused(f"{error}; pip install 'vlm-fusion[remote]' brings what s3:// and gs:// need")
    return Interrupted(f"{type(error).__name__}: {error}")


def holds(url: str, version: Version, timeout: float) -> bool:
    """Whether `url` has that version still, of which the total is known; so also where it does not say. Raises as `receive`."""
    start = (
        version.total - 1 if version.total and _is_http(url) else 0
    )  # the last byte alone, where that can be asked for
    with closing(receive(url, start, version, timeout)) as items:
        head = next(items)
    assert isinstance(head, Head)
    return version.agrees(head.version)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _open(url: str, start: int, version: Version, timeout: float) -> _Opened:
    if url.startswith("pipe:"):
        return _open_pipe(url.removeprefix("pipe:"))
    if _is_http(url):
        return _open_http(url, start, version, timeout)
    return _open_fsspec(url, start, version)


def _open_http(url: str, start: int, version: Version, timeout: float) -> _Opened:
    headers = {"User-Agent": "vlm-fusion", "Accept-Encoding": "identity"}
    if start and version.condition:
        headers |= {"Range": f"bytes={start}-", "If-Range": version.condition}
    try:
        response = urllib.request.urlopen(urllib.request.Request(_quoted(url), headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        message = f"the server answered {error.code} {error.reason}"
        if error.code == 416 and "Range" in headers:  # what was kept is longer than what is there
            return _open_http(url, 0, Version(), timeout)
        if error.code in (408, 425, 429) or error.code >= 500:
            raise Interrupted(message, _wait(error.headers.get("Retry-After") or "", timeout)) from None
        raise Refused(message) from None
    except (http.client.InvalidURL, ValueError) as error:
        raise Refused(f"no usable address ({error})") from None
    try:
        head = _http_head(response)
    except BaseException:
        response.close()
        raise
    if head.start and (head.start != start or not version.agrees(head.version)):
        response.close()
        if "Range" in headers:  # a server that does not know If-Range, or grants another range
            return _open_http(url, 0, Version(), timeout)
        raise Interrupted("the server sent a range that nobody asked for")
    return _Opened(head, lambda: bytes(response.read1(CHUNK)), response.close)


def _quoted(url: str) -> str:
    """An address with blanks and letters beyond ASCII, as browsers send it; what is quoted already stays.

    A # belongs to a shard's name: what it means elsewhere, a place in a page, is never sent to a server.
    """
    parts = urlsplit(url.replace("#", "%23"))
    return parts._replace(path=quote(parts.path, IN_URLS), query=quote(parts.query, IN_URLS)).geturl()


def _http_head(response: Any) -> Head:
    """Its start is -1 where that is not said. Raises Interrupted for an answer without a file, and Refused for one that would have to be decoded."""
    if response.status not in (200, 203, 206):
        raise Interrupted(f"the server answered {response.status} {response.reason}, without a file")
    encoding = (response.headers.get("Content-Encoding") or "identity").strip()
    if encoding.lower() != "identity":
        raise Refused(
            f"the server sends it with Content-Encoding {encoding!r}, though 'identity' was asked for, and nothing here decodes that; "
            "have the server send the file as it is"
        )
    length = response.headers.get("Content-Length") or ""
    start, total = 0, int(length) if length.isdecimal() else None
    if response.status == 206:
        granted = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
        start = int(granted[1]) if granted else -1
        total = int(granted[2]) if granted and granted[2] != "*" else None
    tag, date = response.headers.get("ETag"), response.headers.get("Last-Modified")
    strong = tag if tag and tag.startswith('"') else None
    changed, answered = _moment(date or ""), _moment(response.headers.get("Date") or "")
    # within the second that a date names the content may have changed once more
    settled = date if changed and answered and (answered - changed).total_seconds() > 1 else None
    return Head(start, Version(tag, date, total, strong or settled))


def _moment(date: str) -> datetime | None:
    """That of an HTTP date."""
    try:
        found = parsedate_to_datetime(date)
    except (ValueError, TypeError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _wait(retry_after: str, timeout: float) -> float:
    """The seconds that a server asks for, as a number or as the moment when they are over; at most `timeout`."""
    if retry_after.isdecimal():
        return min(float(retry_after), timeout)
    moment = _moment(retry_after)
    return 0.0 if moment is None else min(max(0.0, (moment - datetime.now(UTC)).total_seconds()), timeout)


def _open_pipe(command: str) -> _Opened:
    process = subprocess.Popen(
        command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    stream = process.stdout.fileno()

    def read() -> bytes:
        data = os.read(stream, CHUNK)
        if not data and (status := process.wait()):
            raise Interrupted(f"the command ended with status {status}")
        return data

    def close() -> None:
        if process.poll() is None:
            with suppress(ProcessLookupError):  # it ends by itself at this moment
                os.killpg(process.pid, signal.SIGKILL)  # the shell and all that it started
            process.wait()

    return _Opened(Head(0, Version()), read, close, close)


def _open_fsspec(url: str, start: int, version: Version) -> _Opened:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except ValueError as error:
        raise Refused(str(error)) from None
    if start:  # what was listed before the break says nothing of now
        system.invalidate_cache(path)

    def look() -> Version:
        info = system.info(path)
        tag = " ".join(f"{name}={info[name]}" for name in CHANGES if info.get(name) is not None) or None
        return Version(tag, None, info.get("size"), tag)

    found = look()
    file = system.open(path, "rb")
    first = start if found.tag and found == version and start <= (found.total or 0) else 0
    file.seek(first)

    def read() -> bytes:
        data = bytes(file.read(CHUNK))
        if not data and look() != found:  # read in several requests, perhaps before and after
            raise Interrupted("it was changed while it was read", restart=True)
        return data

    return _Opened(Head(first, found), read, file.close)
