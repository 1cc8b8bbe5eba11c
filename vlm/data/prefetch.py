"""Remote shards fetched in the background, before their first record is wanted."""

import os
import threading
from concurrent.futures import Future
from queue import SimpleQueue

from vlm.data.remote import RemoteShard

FETCHERS = 4  # downloads of one process at a time


class Prefetcher:
    """Fetches shards into the cache in the order in which they are asked for. One to a reader; what it wants lies in the cache when it is opened.

    Its threads are daemons: a process that ends waits for no download, and the part on the disk serves the next one.
    """

    def __init__(self) -> None:
        self._asked: dict[RemoteShard, Future[None]] = {}
        self._queue: SimpleQueue[tuple[Future[None], RemoteShard] | None] | None = None
        self._threads = 0

    def want(self, shard: RemoteShard) -> None:
        """Fetches it when there is a thread to spare."""
        if shard in self._asked:
            return
        if self._queue is None:  # made at first use, as a reader also travels to other processes
            self._queue = SimpleQueue()
        if self._threads < FETCHERS:
            threading.Thread(target=_work, args=(self._queue,), daemon=True).start()
            self._threads += 1
        self._asked[shard] = Future()
        self._queue.put((self._asked[shard], shard))

    def wait(self, shard: RemoteShard) -> None:
        """Before it is opened: until its download ends, if that has begun, else it is the caller's. Raises what ended the download."""
        asked = self._asked.pop(shard, None)
        if asked is not None and not asked.cancel():
            asked.result()

    def close(self) -> None:
        """Begins nothing more; what is on its way goes on."""
        for asked in self._asked.values():
            asked.cancel()
        self._asked.clear()
        if self._queue is not None:
            for _ in range(self._threads):
                self._queue.put(None)
        self._queue, self._threads = None, 0


def _work(queue: "SimpleQueue[tuple[Future[None], RemoteShard] | None]") -> None:
    while (item := queue.get()) is not None:
        asked, shard = item
        if not asked.set_running_or_notify_cancel():
            continue
        try:
            os.close(shard.open())
            asked.set_result(None)
        except BaseException as error:
            asked.set_exception(error)
