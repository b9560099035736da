"""Hold how a run stands, and judge by its lease and its files whether it lives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtr_scale.checkpoint.lease import LEASE_SECONDS, Holder
from dtr_scale.tracking.attempts import Attempt
from dtr_scale.tracking.findings import Evaluation
from dtr_scale.tracking.goodput import WallTime
from dtr_scale.tracking.journal import Record

STARTING, RUNNING, STALLED, DEAD = "starting", "running", "stalled", "dead"
FINISHED, UNKNOWN = "finished", "unknown"
ENDED = (FINISHED, "preempted", "failed")
"""What status.json tells of an attempt that could tell its end."""

# A lease is renewed every 5 s. Three times as long as it lasts: the clocks of hosts differ.
_OLD_LEASE_SECONDS = 3 * LEASE_SECONDS


@dataclass(frozen=True)
class Saved:
    """The newest checkpoint."""

    step: int
    url: str
    age_seconds: float | None
    """None where the storage cannot be asked."""


@dataclass(frozen=True)
class RunStatus:
    """How a run stands at this moment, as far as its files tell."""

    name: str
    place: str
    state: str
    """starting, running, stalled, dead, finished, preempted, failed or unknown."""
    reason: str = ""
    holder: Holder | None = None
    step: int = 0
    max_steps: int | None = None
    record: Record = field(default_factory=dict)
    """The journal's last."""
    record_age_seconds: float | None = None
    eta_seconds: float | None = None
    saved: Saved | None = None
    evaluation: Evaluation | None = None
    attempts: Sequence[Attempt] = ()
    times: Sequence[WallTime] = ()
    """Of the attempts, if all that is now going on ended now."""
    wall: WallTime | None = None
    """Of the run."""
    problems: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """Return what is told, for programs."""
        return {
            "name": self.name,
            "place": self.place,
            "state": self.state,
            "reason": self.reason,
            "holder": vars(self.holder) if self.holder else None,
            "step": self.step,
            "max_steps": self.max_steps,
            "eta_seconds": self.eta_seconds,
            "record": self.record,
            "record_age_seconds": self.record_age_seconds,
            "checkpoint": vars(self.saved) if self.saved else None,
            "evaluation": _evaluation(self.evaluation),
            "goodput": self.wall.goodput if self.wall else None,
            "wall_time": _seconds(self.wall) if self.wall else None,
            "attempts": [
                _attempt(attempt, time)
                for attempt, time in zip(self.attempts, self.times, strict=True)
            ],
            "problems": list(self.problems),
        }


def judge(status: Mapping[str, Any], holder: Holder | None, *, has_logged: bool) -> tuple[str, str]:
    """Return how a run stands, and why, by what status.json says and who holds its lease.

    `has_logged`: whether the newest attempt has written a record.
    """
    outcome = str(status.get("outcome", ""))
    if outcome in ENDED:
        return outcome, str(status.get("reason", ""))
    if holder is None:
        if not outcome:
            return UNKNOWN, "nothing tells how it stands"
        return DEAD, "it ended without a word, and no job holds it"
    where = f"pid {holder.pid} on {holder.host}"
    age = f"{holder.age_seconds:.0f} s ago"
    if holder.is_alive is False:
        return DEAD, f"{where} is gone; its lease was last renewed {age}"
    if holder.age_seconds > _OLD_LEASE_SECONDS:
        if holder.is_alive:
            told = f"{where} is there and has not renewed its lease since {age[:-4]}"
            return STALLED, f"{told}: it is stopped, or holds the GIL"
        return DEAD, f"{where} has last renewed its lease {age}, every 5 s are expected"
    return RUNNING if has_logged else STARTING, ""


def _evaluation(found: Evaluation | None) -> dict[str, Any] | None:
    if found is None:
        return None
    told = {"step": found.step, "time": found.time.isoformat(), "num_samples": found.num_samples}
    return told | {"metrics": dict(found.metrics)}


def _attempt(attempt: Attempt, time: WallTime) -> dict[str, Any]:
    return {
        "begin": attempt.begin.isoformat(),
        "end": attempt.end.isoformat() if attempt.end else None,
        "from_step": attempt.step,
        "to_step": attempt.end_step,
        "outcome": attempt.outcome,
        "reason": attempt.reason,
        "hosts": attempt.facts.get("hosts"),
        "goodput": time.goodput,
        "wall_time": _seconds(time),
    }


def _seconds(time: WallTime) -> dict[str, float]:
    return {**vars(time), "other": time.other}
