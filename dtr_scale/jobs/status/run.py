"""Tell how a run stands by the files of its directory."""

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dtr_scale.checkpoint.lease import read_holder
from dtr_scale.errors import DtrScaleError
from dtr_scale.jobs.status.state import DEAD, ENDED, RUNNING, RunStatus, judge
from dtr_scale.jobs.status.stored import StoredConfig, newest_saved
from dtr_scale.jobs.status.worries import RECENT_RECORDS, heartbeat, history, worries
from dtr_scale.storage.folder import open_folder
from dtr_scale.tracking.attempts import ATTEMPTS, Attempt, read_attempts, untold_end
from dtr_scale.tracking.findings import read_evaluations
from dtr_scale.tracking.goodput import Ending, closed, step_clock, wall_times, whole_run
from dtr_scale.tracking.journal import Record, read_journal
from dtr_scale.train.run_dir import CONFIG, JOURNAL, LOCK, STATUS, find_object


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (STATUS, JOURNAL, ATTEMPTS))


def read_run(path: Path) -> RunStatus:
    """Return how the run in a directory stands."""
    told, config = find_object(path / STATUS), StoredConfig(find_object(path / CONFIG))
    problems: list[str] = []
    records = _records(path / JOURNAL, problems)
    attempts = read_attempts(path)
    holder = read_holder(open_folder(path), LOCK)
    step = _step(records, attempts, told)
    record = records[-1] if records else {}
    # A job that has just taken the directory has not told the end of the attempt before.
    is_its = bool(holder and attempts and attempts[-1].job in ("", holder.job))
    has_logged = bool(records) and (not attempts or (is_its and step > attempts[-1].step))
    state, reason = judge(told, holder, has_logged=has_logged)
    is_going = holder is not None and state not in (DEAD, *ENDED)
    quiet = _age(path / JOURNAL)
    ending = Ending(datetime.now(UTC), "running", step)
    if not (is_going and is_its):
        # As the next job will tell it: what is dead ended with its last sign.
        outcome, why, end = untold_end(told, time.time() - (quiet or 0.0))
        ending = Ending(end, outcome, step, why)
    saved = newest_saved(config.checkpoints(path), told.get("saved_step"), problems)
    saved_step = saved.step if saved else told.get("saved_step")
    accounted = closed(attempts, ending)
    times = wall_times(accounted, records, saved_step)
    per_step = _seconds_per_step(records, attempts)
    if state == RUNNING:
        problems += worries(records, quiet, per_step, step - (saved_step or 0), config)
    if is_going:
        problems += heartbeat(holder)
    problems += history(path, record)
    left = max(0, (config.max_steps or step) - step)
    return RunStatus(
        name=config.name or path.resolve().name,
        place=str(path),
        state=state,
        reason=reason,
        holder=holder,
        step=step,
        max_steps=config.max_steps,
        record=record,
        record_age_seconds=quiet if records else None,
        eta_seconds=per_step * left if is_going and per_step else None,
        saved=saved,
        evaluation=_newest(path, attempts),
        attempts=attempts if is_going and is_its else accounted,
        times=times,
        wall=whole_run(accounted, times) if accounted else None,
        problems=problems,
    )


def _records(journal: Path, problems: list[str]) -> list[Record]:
    try:
        # Of what is no record, such as a hand's, nothing can be told.
        return [r for r in read_journal(journal) if isinstance(r, dict) and "step" in r]
    except FileNotFoundError:
        return []
    except (OSError, DtrScaleError) as error:
        problems.append(f"the journal cannot be read: {error}")
        return []


def _step(records: Sequence[Record], attempts: Sequence[Attempt], told: Mapping[str, Any]) -> int:
    """Return the step that a run has reached, as far as anything tells."""
    if records:
        return max(int(records[-1]["step"]), attempts[-1].step if attempts else 0)
    return told.get("step") or 0


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _seconds_per_step(records: Sequence[Record], attempts: Sequence[Attempt]) -> float | None:
    """Return the time of a step of the newest attempt, over its newest records."""
    first = attempts[-1].step if attempts else 0
    recent = [record for record in records if record["step"] > first][-RECENT_RECORDS:]
    if not recent:
        return None
    # The record before the recent ones tells where the first of them begins.
    before = [r for r in records if r["step"] < recent[0]["step"]][-1:]
    clock = step_clock([*before, *recent], first)
    start, end = int(before[0]["step"]) if before else first, int(recent[-1]["step"])
    return (clock(end) - clock(start)) / (end - start) or None


def _newest(run_dir: Path, attempts: Sequence[Attempt]) -> Any:  # noqa: ANN401
    found = read_evaluations(run_dir, attempts)
    return max(found, key=lambda evaluation: evaluation.time, default=None)
