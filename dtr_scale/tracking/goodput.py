"""Account for a run's wall time: how much of it was spent on steps that count.

A step counts once: what a kill has taken back and a later attempt makes again is lost. No step is
what starts, loads, compiles, evaluates, or waits for the last save, and the time between attempts.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dtr_scale.errors import DataError
from dtr_scale.tracking.attempts import KILLED, ROLLED_BACK, Attempt, read_attempts
from dtr_scale.tracking.journal import Record, read_journal


@dataclass(frozen=True)
class WallTime:
    """Where the seconds of an attempt or of a whole run went."""

    total: float = 0.0
    counted: float = 0.0
    """On steps that count."""
    lost: float = 0.0
    """On steps that were made again later, or have to be."""
    between: float = 0.0
    """When there was no attempt."""

    @property
    def other(self) -> float:
        """On what is no step: starts, compilation, evaluations, waiting for the last save."""
        return self.total - self.counted - self.lost - self.between

    @property
    def goodput(self) -> float:
        """Share of the time that was spent on steps that count, 0 to 1."""
        return self.counted / self.total if self.total else 0.0


def wall_times(
    attempts: Sequence[Attempt], records: Iterable[Record], saved_step: int | None = None
) -> list[WallTime]:
    """Return the account of each attempt; all have ended (see `closed`).

    `records` are the journal's. Of an attempt without a successor that was killed or has failed,
    the steps up to `saved_step`, the newest checkpoint's, count.
    """
    seconds_at = step_clock(records, min((attempt.step for attempt in attempts), default=0))
    times: list[WallTime] = []
    before: datetime | None = None
    for number, attempt in enumerate(attempts):
        begin, end = attempt.begin, attempt.end or attempt.begin
        # Clocks of two hosts may disagree: no second is counted for two attempts.
        begin = begin if before is None else max(before, begin)
        total = max(0.0, (end - begin).total_seconds())
        made = max(attempt.step, attempt.end_step or attempt.step)
        kept = _kept_step(attempts[number:], made, saved_step)
        # The journal's times of steps are measured within the attempt, but for those that no record
        # tells of: they are taken to be like their neighbours.
        counted = min(total, seconds_at(kept) - seconds_at(attempt.step))
        lost = min(total - counted, seconds_at(made) - seconds_at(kept))
        times.append(WallTime(total, counted, lost))
        before = max(begin, end)
    return times


def whole_run(attempts: Sequence[Attempt], times: Sequence[WallTime]) -> WallTime:
    """Return the account of a run, from the first attempt's begin to the last one's end."""
    if not attempts:
        return WallTime()
    ends = [attempt.end or attempt.begin for attempt in attempts]
    within = sum(time.total for time in times)
    total = max(within, (max(ends) - attempts[0].begin).total_seconds())
    counted, lost = sum(time.counted for time in times), sum(time.lost for time in times)
    return WallTime(total, counted, lost, between=total - within)


class Ending(NamedTuple):
    """How an attempt ends, or would if it ended now."""

    time: datetime
    outcome: str
    step: int
    reason: str = ""


def closed(attempts: Sequence[Attempt], ending: Ending) -> list[Attempt]:
    """Return attempts of which the last, if it still goes on, ends so."""
    if not attempts or attempts[-1].end is not None:
        return list(attempts)
    time, outcome, step, reason = ending
    last = replace(attempts[-1], end=time, outcome=outcome, end_step=step, reason=reason)
    return [*attempts[:-1], last]


def read_goodput(
    run_dir: Path, journal: Path, ending: Ending, saved_step: int | None
) -> tuple[float, float] | None:
    """Return the goodput of a run's last attempt and of the run, by its files; None if unknown.

    An attempt that still goes on is taken to end so.
    """
    try:
        attempts = closed(read_attempts(run_dir), ending)
        times = wall_times(attempts, read_journal(journal), saved_step)
    # Whatever a damaged file leads to: it is told where a run fails, and must not hide why.
    except (OSError, DataError, KeyError, TypeError, ValueError, AttributeError):
        return None
    if not times:
        return None
    return round(times[-1].goodput, 4), round(whole_run(attempts, times).goodput, 4)


def step_clock(records: Iterable[Record], first_step: int) -> Callable[[int], float]:
    """Return what tells the seconds that all steps up to one have taken.

    A record tells the throughput of the steps since the one before it.
    """
    steps, seconds, samples_before = [0.0], [0.0], 0.0
    for record in records:
        speed, samples = record.get("samples_per_second", 0.0), record.get("samples_seen", 0.0)
        if not (math.isfinite(speed) and speed > 0 and record["step"] > steps[-1]):
            continue
        if len(steps) == 1 and first_step < record["step"]:
            # The journal of a run that came here from another host begins in the middle.
            samples_before = samples * first_step / record["step"]
            steps[0] = first_step
        steps.append(record["step"])
        seconds.append(seconds[-1] + (samples - samples_before) / speed)
        samples_before = samples
    per_step = (seconds[-1] - seconds[-2]) / (steps[-1] - steps[-2]) if len(steps) > 1 else 0.0

    def seconds_at(step: int) -> float:
        # Steps after the last record are taken to be like those before it.
        return float(np.interp(step, steps, seconds)) + per_step * max(0.0, step - steps[-1])

    return seconds_at


def _kept_step(attempts: Sequence[Attempt], made: int, saved_step: int | None) -> int:
    """Return up to which step the first of some attempts counts, `made` being its last."""
    first, *later = attempts
    if later:
        kept = min(attempt.step for attempt in later)
    elif first.outcome in (KILLED, "failed", ROLLED_BACK):
        kept = saved_step or 0
    else:
        kept = made
    return max(first.step, min(made, kept))
