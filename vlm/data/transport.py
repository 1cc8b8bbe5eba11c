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
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass

CHUNK = 2**18
SLOWEST = 1024  # bytes a second, over a whole timeout; a server that drips more slowly has stalled


class Refused(Exception):
    """The other side said no (not found, not allowed, unknown protocol): asking again is of no use."""


class Interrupted(Exception):
    """It broke off, or did not answer well: worth another attempt, after `wait` seconds if the other side said so."""

    def __init__(self, message: str, wait: float = 0.0, restart: bool = False) -> None:
        super().__init__(message)
        self.wait, self.restart = wait, restart


@dataclass(frozen=True)
class Head:
    """What is known before the bytes: the number of the first that comes (0 where a range was not granted), how many the whole has, and its tag."""

    start: int
    total: int | None = None
    tag: str | None = None


@dataclass
class _Opened:
    head: Head
    read: Callable[[], bytes]
    """The next bytes, empty at the end; raises Interrupted where the end came too early."""
    close: Callable[[], object]
    abort: Callable[[], object] = lambda: None
    """Ends a read that hangs in another thread, where that needs doing."""


def receive(url: str, start: int, tag: str | None, timeout: float) -> Iterator[Head | bytes]:
    """The head of `url`, then its bytes, from number `start` on where the other side can do that.

    tag: the Head's of an earlier answer; if the content is another one now, it comes from its beginning. Raises Refused or Interrupted, the latter
    also where for `timeout` seconds nothing comes, or less than a kibibyte a second.
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
            source = _open(url, start, tag, timeout)
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


def _open(url: str, start: int, tag: str | None, timeout: float) -> _Opened:
    if url.startswith("pipe:"):
        return _open_pipe(url.removeprefix("pipe:"))
    if url.startswith(("http://", "https://")):
        return _open_http(url, start, tag, timeout)
    return _open_fsspec(url, start)


def _open_http(url: str, start: int, tag: str | None, timeout: float) -> _Opened:
    headers = {"User-Agent": "vlm-fusion", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if tag:
            headers["If-Range"] = tag
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        message = f"the server answered {error.code} {error.reason}"
        if error.code == 416:  # what was kept is longer than what is there
            raise Interrupted(message, restart=True) from None
        if error.code in (408, 425, 429) or error.code >= 500:
            wait = error.headers.get("Retry-After") or ""
            raise Interrupted(message, min(float(wait), timeout) if wait.isdecimal() else 0.0) from None
        raise Refused(message) from None
    except (http.client.InvalidURL, ValueError) as error:
        raise Refused(f"no usable address ({error})") from None
    length = response.headers.get("Content-Length") or ""
    total = int(length) if length.isdecimal() else None
    etag = response.headers.get("ETag") or ""
    found, first = (etag if etag.startswith('"') else None), 0
    if response.status == 206:
        granted = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
        if granted is None or int(granted[1]) != start:
            response.close()
            raise Interrupted(f"the server granted another range than bytes {start} and on", restart=True)
        first, total = start, int(granted[2]) if granted[2] != "*" else None
    return _Opened(Head(first, total, found), lambda: bytes(response.read1(CHUNK)), response.close)


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

    return _Opened(Head(0), read, close, close)


def _open_fsspec(url: str, start: int) -> _Opened:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except ValueError as error:
        raise Refused(str(error)) from None
    total = system.info(path).get("size")
    file = system.open(path, "rb")
    first = start if total is not None and start <= total else 0
    file.seek(first)
    return _Opened(Head(first, total), lambda: bytes(file.read(CHUNK)), file.close)
