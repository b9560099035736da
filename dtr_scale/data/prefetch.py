"""Open the shards that will be needed soon in the background, and hand out those that are open.

Where reading begins, before whole shards have come from object storage, a shard is handed out as a
`RangedShard`: the first batches do not wait.
"""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence

from dtr_scale.data.shards import OpenShard, RangedShard, Shards

_BUSY_SECONDS = 0.05
_MOST_REQUESTS = 256
"""For single samples, before a process waits for whole shards, which come 10x faster."""


class Prefetcher:
    """Opens shards ahead of need in threads that end with their work.

    Errors of the background wait for whoever gets the shard. One thread may call the methods.
    Without a plan, `max_open` shards stay open.
    """

    def __init__(self, shards: Shards, max_open: int, num_threads: int = 2) -> None:
        self._shards = shards
        self._max_open = max_open
        self._num_threads = num_threads
        self._changed = threading.Condition()  # guards everything below but the ranged shards
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._opening: set[int] = set()
        self._failed: set[int] = set()
        self._planned: list[int] = []
        self._threads: list[threading.Thread] = []
        self._ranged: dict[int, RangedShard] = {}
        self._may_range = True

    def plan(self, shards: Sequence[int]) -> None:
        """Open these shards in the background, in this order, and close all others."""
        with self._changed:
            self._planned = list(shards)
            # What failed may be mended by now: it is tried again.
            self._failed.clear()
            # Closed before others are opened: without a disk each of them is held in memory.
            for shard in self._open.keys() - set(shards):
                self._open.pop(shard).close()
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            while len(self._threads) < self._num_threads and self._next() is not None:
                # A daemon: a download that is under way must not hold up the end of the process.
                thread = threading.Thread(target=self._work, name="shard-prefetch", daemon=True)
                self._threads.append(thread)
                thread.start()

    def get(self, shard: int, keep: Collection[int] = ()) -> OpenShard:
        """Return a shard that can be read now; DataError if it cannot be opened.

        Those to `keep` stay open, however many they are.
        """
        with self._changed:
            opened, has_failed = self._open.get(shard), shard in self._failed
        if opened is None and not has_failed:  # a failed one is opened again, for its error
            opened = self._get_ranged(shard)
        return opened or self.get_whole(shard, keep)

    def get_whole(self, shard: int, keep: Collection[int] = ()) -> OpenShard:
        """Return a shard that is verified, opened now if it is not yet."""
        with self._changed:
            self._changed.wait_for(lambda: shard not in self._opening)
            if shard in self._open:
                # Without a plan the shards that were used last stay open.
                self._open.move_to_end(shard)
                return self._open[shard]
            # Before the lock is let go, so that no thread opens it a second time.
            self._opening.add(shard)
        self._open_now(shard, wait=True)
        with self._changed:
            excess = len(self._open) - max(self._max_open, len(self._planned))
            unused = [other for other in self._open if other != shard and other not in keep]
            for other in unused[: max(0, excess)]:
                self._open.pop(other).close()
            return self._open[shard]

    def whole_only(self) -> None:
        """Hand out whole shards alone, until reading begins again."""
        self._may_range = False

    def close(self) -> None:
        """Close all shards; what threads are opening is closed when it comes."""
        self.plan([])
        self._ranged.clear()
        self._may_range = True

    def _get_ranged(self, shard: int) -> OpenShard | None:
        """Return a shard to be read sample by sample; None if it is at hand, or enough were."""
        requests = sum(ranged.num_requests for ranged in self._ranged.values())
        if not self._may_range or requests >= _MOST_REQUESTS:
            return None
        if shard not in self._ranged and (ranged := self._shards.ranged(shard)) is not None:
            self._ranged[shard] = ranged
        return self._ranged.get(shard)

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
            except BlockingIOError:  # another process has it in hand
                time.sleep(_BUSY_SECONDS)
                with self._changed, contextlib.suppress(ValueError):
                    self._planned.remove(shard)
                    self._planned.append(shard)  # others first
            except Exception:  # of any kind: whoever gets the shard opens it again, and meets it
                with self._changed:
                    self._failed.add(shard)

    def _open_now(self, shard: int, *, wait: bool) -> None:
        opened = None
        try:
            # Without the lock: this may take as long as a download.
            opened = self._shards.open(shard, wait)
        finally:
            with self._changed:
                self._opening.discard(shard)
                # After an error, too: `get_whole` may wait for this shard.
                self._changed.notify_all()
                if opened is not None and (wait or shard in self._planned):
                    self._open[shard] = opened
                elif opened is not None:  # the plan has changed meanwhile
                    opened.close()
