"""Keep a run's attempts in attempts.jsonl: a line when a job begins, and one when it ends.

An attempt is one job of a run, from its start to its end or its death.
"""

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

ATTEMPTS = "attempts.jsonl"
KILLED = "killed"
"""The outcome of an attempt that could not tell how it ended."""
ROLLED_BACK = "rolled back"
"""Of one that its own job has given up, to begin another at the newest checkpoint."""


@dataclass(frozen=True)
class Attempt:
    """One job of a run."""

    id: str
    start: datetime
    step: int
    """The step that it went on from."""
    facts: Mapping[str, Any]
    """Where and how it ran: hosts, world_size, commit."""
    launched: datetime | None = None
    """When its command was started: from there to `start` it imports, connects and loads."""
    job: str = ""
    """Which job it is of, as the lease of the run directory names it."""
    end: datetime | None = None
    outcome: str = ""
    reason: str = ""
    end_step: int | None = None
    goodput: float | None = None
    """Share of its wall time that was spent on steps that count, see `goodput.py`."""
    run_goodput: float | None = None
    """The same of the run, from its first attempt to the end of this one."""

    @property
    def begin(self) -> datetime:
        return min(self.launched or self.start, self.start)


def begin_attempt(
    run_dir: Path,
    *,
    step: int,
    launched: datetime | None = None,
    job: str = "",
    **facts: Any,  # noqa: ANN401
) -> str:
    """Write that a job begins at a step; return the attempt's id."""
    attempt = secrets.token_hex(8)
    times = {"start": _now()} | ({"launched": _text(launched)} if launched else {})
    told = {"job": job, "step": step, "facts": facts}
    _append(run_dir, {"attempt": attempt, **times, **told})
    return attempt


def end_attempt(
    run_dir: Path,
    attempt: str,
    *,
    outcome: str,
    step: int | None,
    reason: str = "",
    time: datetime | None = None,
    goodput: tuple[float, float] | None = None,
) -> None:
    """Write how an attempt has ended; `goodput` is its own, and the run's until then."""
    told: dict[str, Any] = {"outcome": outcome, "reason": reason, "step": step}
    if goodput:
        told |= {"goodput": goodput[0], "run_goodput": goodput[1]}
    _append(run_dir, {"attempt": attempt, "end": _text(time) if time else _now(), **told})


def close_open_attempt(
    run_dir: Path,
    status: Mapping[str, Any],
    last_sign: float,
    *,
    last_step: int = 0,
    measure: Callable[[datetime, str, int], tuple[float, float] | None] = lambda *told: None,
) -> None:
    """Write how the attempt before has ended, if it could not.

    By what its status.json told, else it was killed at its last sign of life, seconds since 1970.
    `last_step` is that of its journal, which goes further than a status written with a checkpoint.
    `measure` is given end, outcome and step, and returns its goodput and the run's.
    """
    for attempt in read_attempts(run_dir)[-1:]:
        if attempt.end is not None:
            continue
        outcome, reason, time = untold_end(status, last_sign)
        step = max(last_step, status.get("step") or 0, attempt.step)
        goodput = measure(time, outcome, step)
        told = {"outcome": outcome, "reason": reason, "time": time, "goodput": goodput}
        end_attempt(run_dir, attempt.id, step=step, **told)


def untold_end(status: Mapping[str, Any], last_sign: float) -> tuple[str, str, datetime]:
    """Return outcome, reason and time of an attempt that could not write its end."""
    outcome = status.get("outcome")
    if outcome in ("failed", "preempted", "finished"):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            time = datetime.fromisoformat(status["time"])
            return outcome, str(status.get("reason", "")), time
    return KILLED, "it ended without a word", datetime.fromtimestamp(last_sign, UTC)


def read_attempts(run_dir: Path) -> list[Attempt]:
    """Return a run's attempts in the order of their start; lines that are damaged do not count."""
    attempts: dict[str, Attempt] = {}
    for line in read_lines(run_dir / ATTEMPTS):
        try:
            name = line["attempt"]
            if "start" in line:
                start = datetime.fromisoformat(line["start"])
                launched = datetime.fromisoformat(line.get("launched", line["start"]))
                step, facts = int(line["step"]), line["facts"]
                job = str(line.get("job", ""))
                attempts[name] = Attempt(name, start, step, facts, launched, job)
            elif name in attempts:
                attempts[name] = replace(
                    attempts[name],
                    end=datetime.fromisoformat(line["end"]),
                    outcome=line["outcome"],
                    reason=line["reason"],
                    end_step=line["step"],
                    goodput=line.get("goodput"),
                    run_goodput=line.get("run_goodput"),
                )
        except (KeyError, TypeError, ValueError):
            continue
    return list(attempts.values())


def counts(step: int, time: datetime, attempts: Iterable[Attempt]) -> bool:
    """Tell whether what was found at `time` of the state after `step` belongs to the run.

    Not if a later attempt went on from an earlier step: it makes that state again, or another.
    """
    # The times of evaluations are whole seconds.
    return not any(a.step < step and a.start.replace(microsecond=0) > time for a in attempts)


def read_lines(path: Path) -> Sequence[dict[str, Any]]:
    """Return the JSON objects of a file, one a line; what a kill has cut off is left out."""
    try:
        content = path.read_bytes()
    except OSError:
        return []
    found = []
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _append(run_dir: Path, entry: dict[str, Any]) -> None:
    try:
        with (run_dir / ATTEMPTS).open("a+b", buffering=0) as file:
            end = file.tell()
            file.seek(max(end - 1, 0))
            # A kill may have cut the line before.
            separator = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(separator + json.dumps(entry).encode() + b"\n")
            # An end that a power cut takes would be told as a kill.
            os.fsync(file.fileno())
    except OSError as error:  # it is told of the run, and not worth it
        log.warning("%s cannot be written: %s", run_dir / ATTEMPTS, error.strerror)


def _now() -> str:
    return _text(datetime.now(UTC))


def _text(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds")
