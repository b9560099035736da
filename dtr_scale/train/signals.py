"""Requests to leave: a signal, a time limit that comes near, or a launcher that is gone."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dtr_scale.launchers import launched_rank

LAUNCHER_PID = "DTR_SCALE_LAUNCHER_PID"
"""Set by a launch script to its own pid: when it is gone, its ranks leave."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class LeaveRequest:
    """Remembers why this rank should checkpoint and leave; None as long as it should not.

    `max_minutes` after its construction is a reason too.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._max_minutes = max_minutes
        self._deadline = time.monotonic() + 60 * (max_minutes or float("inf"))
        self._signal: str | None = None
        self._interrupted = False
        self._parent = os.getppid()
        launcher = os.environ.get(LAUNCHER_PID)
        self._launcher = int(launcher) if launcher else None

    @property
    def reason(self) -> str | None:
        if self._signal:
            return self._signal
        if os.getppid() != self._parent or (self._launcher and not _is_alive(self._launcher)):
            return "the launcher is gone"
        if time.monotonic() > self._deadline:
            return f"train.max_minutes = {self._max_minutes:g} are over"
        return None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM, SIGUSR1, SIGINT and SIGHUP; a second SIGINT leaves at once.

        A signal that the parent had ignored, as `nohup` does, stays ignored.
        """
        heard = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(130)
            self._interrupted = True
            if launched_rank() == 0:
                os.write(2, b"\nleaving after this step; Ctrl-C again leaves at once\n")
        self._signal = self._signal or signal.Signals(number).name


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
