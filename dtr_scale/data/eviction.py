"""Evict the shards whose next use is farthest away (Belady)."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from dtr_scale.data.seals import open_copy, open_lock

_IDLE_SECONDS = 3600.0


class _Copy(NamedTuple):
    path: Path
    num_bytes: int
    used_at: float  # seconds since the epoch


class CacheFolder:
    """A folder of shards named `<sha256>.tar`, that jobs may share, of at most `max_bytes`.

    `next_uses` returns the hashes of this job's shards in order of next use. Those of other jobs
    go first when nobody has opened them for an hour, and last otherwise, by last use; in between
    this job's own go, the one whose next use is farthest first. What some process holds open goes
    only if nothing else is left.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.next_uses: Callable[[], Iterable[str]] = tuple

    def use(self, file: FileIO) -> None:
        """Note that a copy is used now, and keep it until it is closed."""
        fcntl.flock(file, fcntl.LOCK_SH)
        # The time of reading, which mounts with relatime or noatime do not keep. That of writing
        # stays: it tells whether it is the copy that was verified.
        os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))

    def make_room(self, num_bytes: int) -> None:
        """Evict until `num_bytes` more fit."""
        for path in self.path.glob(".*.part"):  # of a download that was killed
            with contextlib.suppress(FileNotFoundError):
                # One that is under way has been written to a moment ago.
                if time.time() - path.stat().st_mtime > _IDLE_SECONDS:
                    path.unlink()
        excess = num_bytes - self.max_bytes + sum(copy.num_bytes for copy in self._copies())
        if excess > 0 and (freed := self.evict(excess)) < excess:
            # Readers keep what they have open; the disk gets its room back when they close it.
            self.evict(excess - freed, in_use=True)

    def evict(self, num_bytes: int, *, in_use: bool = False) -> int:
        """Remove copies of `num_bytes` together and return what they had; 0: none can go."""
        freed = 0
        with open_lock(self.path / "evict.lock") as lock:
            # One process at a time, or two would both free the room that one of them needs.
            fcntl.flock(lock, fcntl.LOCK_EX)
            for copy in self._least_needed_first():
                if freed >= num_bytes:
                    break
                if in_use or _is_free(copy.path):
                    copy.path.unlink(missing_ok=True)
                    copy.path.with_suffix(".index.npy").unlink(missing_ok=True)
                    freed += copy.num_bytes
        return freed

    def _copies(self) -> Iterator[_Copy]:
        for path in self.path.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process evicts, too
                stat = path.stat()
                yield _Copy(path, stat.st_size, stat.st_atime)

    def _least_needed_first(self) -> list[_Copy]:
        now = time.time()
        uses = {name: nth for nth, name in enumerate(self.next_uses())}

        def need(copy: _Copy) -> tuple[int, float]:
            if copy.path.stem in uses:
                # Belady's rule: of what this job will need, the farthest use goes first.
                return 1, -uses[copy.path.stem]
            return (0 if now - copy.used_at > _IDLE_SECONDS else 2), copy.used_at

        return sorted(self._copies(), key=need)


def _is_free(path: Path) -> bool:
    """Tell whether no process holds a copy open."""
    try:
        with open_copy(path) as file:  # readers hold a shared lock until they close it (see `use`)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):
        return False
    return True
