"""Note where a rank's main thread is, for those who judge whether it hangs.

Every rank goes through the same sections in the same order, so of ranks that wait for each other,
the one that has entered fewest is the one that they wait for.
"""

import time
from collections import deque
from typing import NamedTuple

EXEMPT = frozenset({"start", "evaluation", "save", "log"})
"""Sections that may take any time: compilation, storage and file systems decide how long."""
LOOP = frozenset({"data", "forward", "backward", "update", "save", "log"})
_DATA_SECONDS = 600.0  # storage is retried for minutes
_WARM_UP_STEPS, _LEARNT_STEPS = 2, 5
_FLOOR_SECONDS, _MARGIN_SECONDS = 15.0, 25.0


class Position(NamedTuple):
    """Where a main thread is: sections entered so far, the last one, its step, seconds in it."""

    entered: int
    section: str
    step: int
    seconds: float

    @property
    def is_exempt(self) -> bool:
        """Whether nobody can say how long this may take."""
        return self.section in EXEMPT or (self.section == "data" and self.seconds < _DATA_SECONDS)


class Place:
    """Where this rank's main thread is; it alone writes, other threads read."""

    def __init__(self) -> None:
        now = time.monotonic()
        self._entered = 0
        self._step = 0
        # One object, so that a reader never sees the section of one moment and the time of another.
        self._section: tuple[str, float] = ("start", now)
        self._exempt_seconds = 0.0
        self._num_steps = 0
        self._seconds: deque[float] = deque(maxlen=64)
        self.step_ended_at = now

    def enter(self, section: str) -> None:
        """Note that the main thread goes on to a section."""
        now = time.monotonic()
        before, since = self._section
        if before in EXEMPT or before == "data":
            self._exempt_seconds += now - since
        self._entered += 1
        self._section = (section, now)

    def end_step(self, step: int) -> None:
        """Note that a step has ended, and learn from how long it took."""
        now = time.monotonic()
        self._num_steps += 1
        if self._num_steps > _WARM_UP_STEPS:  # those before compile and allocate
            self._seconds.append(now - self.step_ended_at - self._exempt_seconds)
        self._exempt_seconds = 0.0
        self._step = step
        self.step_ended_at = now

    @property
    def position(self) -> Position:
        section, since = self._section
        return Position(self._entered, section, self._step, time.monotonic() - since)

    @property
    def limit_seconds(self) -> float | None:
        """By when a step that takes longer hangs; None as long as too few are known.

        At most 25 s after the slowest of the last 64 would have ended.
        """
        if len(self._seconds) < _LEARNT_STEPS:
            return None
        slowest = max(list(self._seconds))
        return min(max(_FLOOR_SECONDS, 5 * slowest), slowest + _MARGIN_SECONDS)
