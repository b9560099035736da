"""End every rank of a run in which one has failed.

A rank that waits in a collective for one that is gone may wait for half an hour (NCCL), and there
may be no launcher that would end it. So every rank looks for failures in a key-value store that
rank 0 serves, from a thread that does not wait for collectives.
"""

import atexit
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from dtr_scale.engines.world import World

log = logging.getLogger(__name__)

_FAILURE = "failure"
_REQUEST_TIMEOUT = timedelta(seconds=30)


class Failure(NamedTuple):
    """A rank's failure: its reason, and the exit code that all ranks end with."""

    reason: str
    exit_code: int = 1


_LOST_MAIN = Failure("rank 0 is gone: it was killed, or its node is lost")


class PeerWatch:
    """One rank's watch over the others, from its construction to `close`.

    Every `interval_seconds` a rank shows that it is alive and looks for a failure. Rank 0 posts a
    failure for a rank that has shown nothing for `silence_seconds`. A rank that still runs
    `grace_seconds` after a failure was posted, or after rank 0 was lost, ends by `end(failure)`.
    """

    def __init__(
        self,
        world: World,
        *,
        interval_seconds: float = 2.0,
        grace_seconds: float = 20.0,
        silence_seconds: float = 120.0,
        end: Callable[[Failure], None],
    ) -> None:
        self._world = world
        self._interval = interval_seconds
        self._grace = grace_seconds
        self._silence = silence_seconds
        self._end = end
        self._closing = threading.Event()
        self._beats: dict[int, tuple[bytes, float]] = {}
        if world.world_size == 1:
            return
        host = os.environ["MASTER_ADDR"]
        self._store: Any = None
        if world.is_main:
            self._store = _store(host, 0, serves=True)
        port = world.broadcast_object(self._store.port if self._store else None)
        self._store = self._store or _store(host, port, serves=False)
        self._thread = threading.Thread(target=self._watch, name="peer-watch", daemon=True)
        self._thread.start()

    def post(self, reason: str, exit_code: int = 1) -> None:
        """Tell all ranks that this one has failed; the first failure stays."""
        if self._world.world_size > 1 and not self.failure():
            try:
                self._post(f"rank {self._world.rank}: {reason}", exit_code)
            except dist.DistError:
                log.debug("rank 0 is gone")

    def failure(self) -> Failure | None:
        """Return the failure that was posted, the loss of rank 0, or None."""
        if self._world.world_size == 1:
            return None
        try:
            found = self._store.check([_FAILURE])
            return Failure(*json.loads(self._store.get(_FAILURE))) if found else None
        except dist.DistError:
            return _LOST_MAIN

    def wait_for_failure(self, seconds: float) -> Failure | None:
        """Return what `failure` does, after waiting for one up to `seconds`; None for its own."""
        deadline = time.monotonic() + seconds
        while self._world.world_size > 1:
            failure = self.failure()
            if failure or time.monotonic() > deadline:
                return failure
            time.sleep(0.1)
        return None

    def close(self) -> None:
        """Stop watching; every rank calls it after the last collective.

        The caller's barrier before it matters: once rank 0 is gone, its store is gone, and a rank
        that still watches takes that for a failure.
        """
        self._closing.set()
        if self._world.world_size > 1:
            self._thread.join()

    def _watch(self) -> None:
        beat = 0
        while not self._closing.wait(self._interval):
            beat += 1
            try:
                self._store.set(f"alive/{self._world.rank}", str(beat))
                if self._world.is_main:
                    self._look_for_silence()
            except dist.DistError:
                pass  # rank 0 is gone, as `failure` tells
            if failure := self.failure():
                break
        else:
            return
        if not self._closing.wait(self._grace):
            # From this thread: the main one may wait in a collective that never returns.
            self._end(failure)

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        for rank in range(1, self._world.world_size):
            key = f"alive/{rank}"
            # `check` first: `get` waits for a key that is not there.
            beat = self._store.get(key) if self._store.check([key]) else b""
            last, since = self._beats.get(rank, (None, now))
            self._beats[rank] = (beat, now if beat != last else since)
            # By rank 0's own clock, from when it saw the last change: the clocks of nodes differ.
            if now - self._beats[rank][1] > self._silence:
                self._post(f"rank {rank}: no sign of life for {self._silence:.0f} s", 1)

    def _post(self, reason: str, exit_code: int) -> None:
        self._store.set(_FAILURE, json.dumps([reason, exit_code]))


def end_at_exit(exit_code: int) -> None:
    """Let this process end by `os._exit` when Python would begin to take itself down.

    For a rank that has failed: its watch, its saves and gloo may be inside C++ at that moment, and
    cannot be waited for where peers are gone. Python ends such a thread when it next asks for the
    GIL, by unwinding its stack through frames that may not be unwound: the process aborts with
    "terminate called without an active exception" and -6 instead of the exit code.
    """
    atexit.register(_end, exit_code)


def _end(exit_code: int) -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _store(host: str, port: int, *, serves: bool) -> Any:  # noqa: ANN401
    # Rank 0 must not wait for the others here: they do not know its port yet.
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        host, port, is_master=serves, wait_for_workers=False, timeout=_REQUEST_TIMEOUT
    )
