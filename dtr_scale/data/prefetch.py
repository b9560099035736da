"""The shards that a process holds open: those it will need soon, opened in the background."""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from io import FileIO
from typing import NamedTuple

import numpy as np

from dtr_scale.errors import DtrScaleError

_BUSY_SECONDS = 0.05


class OpenShard(NamedTuple):
    """A shard's verified file, and where its samples lie."""

    file: FileIO
    rows: np.ndarray  # int64 [samples, 4], see `dtr_scale.prepare.writer`


class OpenShards:
    """Opens shards ahead of need in threads that end with their work.

    `open_shard(shard, wait)` may raise BlockingIOError when another process has the shard in hand
    and `wait` is False. Its other errors wait for whoever gets the shard. One thread may call the
    methods. Without a plan, `max_open` shards stay open.
    """

    def __init__(
        self, open_shard: Callable[[int, bool], OpenShard], max_open: int, num_threads: int = 2
    ) -> None:
        self._open_shard = open_shard
        self._max_open = max_open
        self._num_threads = num_threads
        self._changed = threading.Condition()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._opening: set[int] = set()
        self._failed: set[int] = set()
        self._planned: list[int] = []
        self._threads: list[threading.Thread] = []

    def plan(self, shards: Sequence[int]) -> None:
        """Open these shards in the background, in this order, and close all others."""
        with self._changed:
            self._planned = list(shards)
            self._failed.clear()
            for shard in self._open.keys() - set(shards):
                self._open.pop(shard).file.close()
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            while len(self._threads) < self._num_threads and self._next() is not None:
                thread = threading.Thread(target=self._work, name="shard-prefetch", daemon=True)
                self._threads.append(thread)
                thread.start()

    def ready(self, shard: int) -> OpenShard | None:
        """Return a shard that is open."""
        with self._changed:
            return self._open.get(shard)

    def has_failed(self, shard: int) -> bool:
        """Tell whether a shard could not be opened in the background."""
        with self._changed:
            return shard in self._failed

    def get(self, shard: int, keep: Collection[int] = ()) -> OpenShard:
        """Return a shard, opened now if it is not yet; DataError if it cannot be.

        Those to `keep` stay open, however many they are.
        """
        with self._changed:
            self._changed.wait_for(lambda: shard not in self._opening)
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
            self._opening.add(shard)
        self._open_now(shard, wait=True)
        with self._changed:
            excess = len(self._open) - max(self._max_open, len(self._planned))
            unused = [other for other in self._open if other != shard and other not in keep]
            for other in unused[: max(0, excess)]:
                self._open.pop(other).file.close()
            return self._open[shard]

    def close(self) -> None:
        """Close all shards; what threads are opening is closed when it comes."""
        self.plan([])

    def _next(self) -> int | None:
        begun = self._open.keys() | self._opening | self._failed
        return next((shard for shard in self._planned if shard not in begun), None)

    def _work(self) -> None:
        while True:
            with self._changed:
                shard = self._next()
                if shard is None:
                    return
                self._opening.add(shard)
            try:
                self._open_now(shard, wait=False)
            except BlockingIOError:
                time.sleep(_BUSY_SECONDS)
                with self._changed, contextlib.suppress(ValueError):
                    self._planned.remove(shard)
                    self._planned.append(shard)  # others first
            except (DtrScaleError, OSError):
                with self._changed:
                    self._failed.add(shard)

    def _open_now(self, shard: int, *, wait: bool) -> None:
        opened = None
        try:
            opened = self._open_shard(shard, wait)
        finally:
            with self._changed:
                self._opening.discard(shard)
                self._changed.notify_all()
                if opened is not None and (wait or shard in self._planned):
                    self._open[shard] = opened
                elif opened is not None:
                    opened.file.close()
