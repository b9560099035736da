"""Show on each node that a training lives: a file that is renewed, and gets old if it does not.

It is renewed every 30 s by a thread, so whatever the main thread does: imports, a compilation, an
evaluation, a save. It gets old where the process is stopped or killed, where something holds the
GIL for good, and where the loop has stood still for 45 minutes after its first step. One process
speaks for its node: a rank that hangs keeps all others in their next collective, and one that is
gone ends them (`engines.peers`).
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dtr_scale.errors import EngineError

HEARTBEAT = "DTR_SCALE_HEARTBEAT"
"""The variable that names the file, on a disk of the node's own; without it there is none."""

_INTERVAL_SECONDS = 30.0
# Longer than any wait that ends by itself: a collective gives up after 30 minutes.
_STANDSTILL_SECONDS = 45 * 60.0


class Heartbeat:
    """Renews the file at `path` while it is entered; does nothing without a path.

    EngineError, on entering, if the file cannot be written.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        interval_seconds: float = _INTERVAL_SECONDS,
        standstill_seconds: float = _STANDSTILL_SECONDS,
    ) -> None:
        self._path = path
        self._interval = interval_seconds
        self._standstill = standstill_seconds
        self._moved_at: float | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="heartbeat", daemon=True)

    @contextmanager
    def beating(self) -> Iterator["Heartbeat"]:
        """Renew the file from here to the end of the block, which removes it."""
        if self._path:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.touch()
            except OSError as error:
                raise EngineError(
                    f"{HEARTBEAT} = {str(self._path)!r} cannot be written: {error.strerror}; give "
                    "a file on a disk of this node, or unset it"
                ) from None
            self._thread.start()
        try:
            yield self
        finally:
            self.stop()

    def moved(self) -> None:
        """Note that the main thread has come round; from the first time on it has to."""
        self._moved_at = time.monotonic()

    def stop(self) -> None:
        """Remove the file: nothing trains here."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()  # or it might make the file again
            self.remove()

    def remove(self) -> None:
        """Remove the file of a process that ends with the next line: nothing is waited for.

        A signal handler may call this, and may have interrupted `stop`, whose lock it cannot take.
        """
        if self._path:
            with suppress(OSError):
                self._path.unlink()

    def _renew(self) -> None:
        assert self._path
        while not self._stopping.wait(self._interval):
            moved_at = self._moved_at
            # Compilation and loading come before the first step, and may take any time.
            if moved_at is None or time.monotonic() - moved_at < self._standstill:
                with suppress(OSError):  # a full disk lets the time of a file be set all the same
                    self._path.touch()


def launched_heartbeat() -> Heartbeat:
    """Return the heartbeat that the environment asks for; one process of each node has it."""
    place = os.environ.get(HEARTBEAT)
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    return Heartbeat(Path(place) if place and is_first else None)


def check_heartbeat(path: Path, max_seconds: float) -> tuple[bool, str]:
    """Tell whether all is well on this node, and why: no file is well, an old one is not."""
    try:
        # Against this node's clock, which the file's time is of.
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return True, f"nothing trains here: there is no {path}"
    told = f"{path} was renewed {age:.0f} s ago"
    if age <= max_seconds:
        return True, f"healthy: {told}"
    return False, f"unhealthy: {told}; at most {max_seconds:.0f} s are accepted"
