"""End every rank of a run in which one has failed, is gone or hangs.

A rank that waits in a collective for one that is gone may wait for half an hour (NCCL), and there
may be no launcher that would end it. So every rank is connected to rank 0 and looks for failures
from a thread that does not wait for collectives. Its kernel tells the end of a process at once, and
the loss of a host shows within seconds. Rank 0 judges who hangs: it knows where all ranks are.
"""

import atexit
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dtr_scale.engines.links import Links
from dtr_scale.engines.place import LOOP, Place, Position
from dtr_scale.engines.stacks import Stacks
from dtr_scale.engines.world import World

log = logging.getLogger(__name__)

_STEP_SILENCE_SECONDS = 20.0
"""Within steps nothing holds the GIL for long. Imports and a compiler may, before them."""
_STACKS_MARGIN = 1.25
_WRITE_SECONDS = 3.0


class Failure(NamedTuple):
    """A rank's failure: its reason, and the exit code that all ranks end with."""

    reason: str
    exit_code: int = 1


_GONE = "is gone: it was killed, or its node is lost"
_SILENT = "no sign of life for {:.0f} s: it is stopped, or something holds its GIL"


_AT_START = Position(0, "start", 0, 0.0)


@dataclass
class _Peer:
    heard_at: float
    host: str = ""
    position: Position = _AT_START
    has_left: bool = False


class PeerWatch:
    """One rank's watch over the others, from its construction to `close`.

    Every `interval_seconds` a rank shows that it is alive and where it is. Rank 0 posts a failure
    for a rank whose connection ends, for one that has shown nothing for `silence_seconds`, in steps
    for 20 s, and for one that others wait for in a step that takes too long. A rank that still runs
    `grace_seconds` after a failure ends by `end(failure)`; `told` is called at once, but not for
    what this rank has posted of itself.
    """

    def __init__(
        self,
        world: World,
        *,
        interval_seconds: float = 2.0,
        grace_seconds: float = 5.0,
        silence_seconds: float = 120.0,
        end: Callable[[Failure], None],
        told: Callable[[Failure], None] = lambda failure: None,
    ) -> None:
        self._world = world
        self._interval = interval_seconds
        self._grace = grace_seconds
        self._silence = silence_seconds
        self._end = end
        self._told = told
        self._closing = threading.Event()
        self._failure: Failure | None = None
        self._has_failed = False
        self._lock = threading.Lock()
        self._place = Place()
        self._stacks: Stacks | None = None
        if world.world_size == 1:
            return
        now = time.monotonic()
        ranks = range(1, world.world_size) if world.is_main else (0,)
        self._peers = {rank: _Peer(now) for rank in ranks}
        self._exempt_at = now
        self._links = Links(world.rank, self._take, self._lose)
        host = os.environ["MASTER_ADDR"]
        address = self._links.listen(host, world.world_size) if world.is_main else None
        address = world.broadcast_object(address)
        if not world.is_main:
            self._links.connect(address, socket.gethostname())
        self._thread = threading.Thread(target=self._watch, name="peer-watch", daemon=True)
        self._thread.start()

    def follow(self, place: Place, stacks: Stacks) -> None:
        """Judge by `place` from here on whether a rank hangs; write `stacks` at a failure."""
        if self._world.world_size > 1:
            stacks.open()
            self._place, self._stacks = place, stacks

    def post(self, reason: str, exit_code: int = 1) -> None:
        """Tell all ranks that this one has failed; the first failure stays."""
        if self._world.world_size > 1:
            self._post(Failure(f"rank {self._world.rank}: {reason}", exit_code), own=True)

    def failure(self) -> Failure | None:
        """Return the first failure, or None."""
        return self._failure

    def wait_for_failure(self, seconds: float) -> Failure | None:
        """Return what `failure` does, after waiting for one up to `seconds`."""
        deadline = time.monotonic() + seconds
        while self._world.world_size > 1 and not self._failure and time.monotonic() < deadline:
            time.sleep(0.1)
        return self._failure

    def close(self) -> None:
        """Stop watching; every rank calls it after the last collective."""
        self._closing.set()
        if self._world.world_size == 1:
            return
        # First: the others must not take the end of this connection for a loss.
        self._links.send({"leaving": True})
        self._thread.join()
        self._links.close()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closing.is_set() and not self._failure:
            self._links.send({"at": self._place.position})
            if self._stacks and not self._has_failed:
                # Longer than rank 0 is silent about it, which tells all why.
                self._stacks.put_off(_STACKS_MARGIN * self._patience(self._place.position))
            # In short turns: a failure of this rank itself is posted by another thread.
            for _ in range(10):
                if not self._closing.is_set() and not self._failure:
                    self._links.wait(self._interval / 10)
            now = time.monotonic()
            if now - before > 3 * self._interval:
                self._forgive(now)  # this process itself was stopped, perhaps with all others
            before = now
            self._look_for_silence(now)
            if self._world.is_main:
                self._look_for_hang(now)
        # From this thread: the main one may wait in a collective that never returns.
        if self._failure and not self._closing.wait(self._grace):
            self._end(self._failure)

    def _take(self, rank: int, line: dict[str, Any]) -> None:
        peer = self._peers[rank]
        peer.heard_at = time.monotonic()
        peer.host = line.get("host", peer.host)
        peer.has_left = peer.has_left or "leaving" in line
        if "at" in line:
            peer.position = Position(*line["at"])
        if "failure" in line:
            self._post(Failure(*line["failure"]))

    def _lose(self, rank: int) -> None:
        if not self._peers[rank].has_left and not self._closing.is_set():
            self._post(Failure(f"{self._name(rank)} {_GONE}"))

    def _post(self, failure: Failure, *, own: bool = False) -> None:
        with self._lock:
            if self._has_failed:
                return
            self._has_failed = True
        # A rank tells rank 0, and rank 0 all others.
        self._links.send({"failure": failure})
        # Before the main thread knows, whose stack would be that of its end. The run directory may
        # be away, which must keep nobody.
        writing = threading.Thread(target=self._write, args=[failure, own], daemon=True)
        writing.start()
        writing.join(_WRITE_SECONDS)
        self._failure = failure

    def _write(self, failure: Failure, own: bool) -> None:
        if self._stacks and failure.exit_code == 1:
            self._stacks.write(failure.reason)
        if not own:
            self._told(failure)

    def _name(self, rank: int) -> str:
        host = self._peers[rank].host
        return f"rank {rank} on {host}" if host else f"rank {rank}"

    def _patience(self, position: Position) -> float:
        if self._place.limit_seconds is None:
            return self._silence
        own = self._place.position
        # What a rank has told may be of its start, seconds and many short steps ago: it has gone
        # through these with this rank since.
        went_on = own.section in LOOP and own.step > position.step
        in_steps = position.section in LOOP or went_on
        return min(self._silence, _STEP_SILENCE_SECONDS) if in_steps else self._silence

    def _forgive(self, now: float) -> None:
        for peer in self._peers.values():
            peer.heard_at = now
        self._exempt_at = now

    def _look_for_silence(self, now: float) -> None:
        for rank, peer in self._peers.items():
            # By this rank's own clock: the clocks of nodes differ.
            seconds = now - peer.heard_at
            if not peer.has_left and seconds > self._patience(peer.position):
                self._post(Failure(f"{self._name(rank)}: {_SILENT.format(seconds)}"))

    def _look_for_hang(self, now: float) -> None:
        own, limit = self._place.position, self._place.limit_seconds
        positions = {0: own, **{rank: peer.position for rank, peer in self._peers.items()}}
        if limit is None or any(position.is_exempt for position in positions.values()):
            self._exempt_at = now  # the others may wait for that one
            return
        seconds = now - max(self._place.step_ended_at, self._exempt_at)
        if seconds <= limit:
            return
        least = min(position.entered for position in positions.values())
        behind = [rank for rank, position in positions.items() if position.entered == least]
        where = f"step {own.step + 1}, {positions[behind[0]].section}"
        who = "all ranks" if len(behind) == len(positions) else f"ranks {behind}"
        if len(behind) == 1:
            who = self._name(behind[0]) if behind[0] else "rank 0"
        self._post(
            Failure(f"{who}: hung for {seconds:.0f} s in {where}; accepted are {limit:.0f} s")
        )


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
