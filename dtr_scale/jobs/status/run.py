"""Tell how a run stands by the files of its directory."""

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from dtr_scale.checkpoint.lease import Holder, read_holder
from dtr_scale.errors import DtrScaleError
from dtr_scale.heartbeat import HEARTBEAT, check_heartbeat
from dtr_scale.jobs.status.state import DEAD, ENDED, RUNNING, RunStatus, judge
from dtr_scale.jobs.status.stored import StoredConfig, newest_saved
from dtr_scale.storage.folder import open_folder
from dtr_scale.tracking.attempts import ATTEMPTS, KILLED, Attempt, read_attempts
from dtr_scale.tracking.findings import read_evaluations
from dtr_scale.tracking.goodput import Ending, closed, step_clock, wall_times, whole_run
from dtr_scale.tracking.journal import Record, read_journal
from dtr_scale.train.run_dir import CONFIG, JOURNAL, LOCK, STATUS, find_object

_RECENT_RECORDS = 50
_HEARTBEAT_SECONDS = 300.0
_SILENT_SECONDS, _SILENT_RECORDS = 120.0, 10
_MUCH_WAITING = 0.2


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
    has_logged = not attempts or step > attempts[-1].step
    state, reason = judge(told, holder, has_logged=has_logged)
    is_going = holder is not None and state not in (DEAD, *ENDED)
    quiet = _age(path / JOURNAL)
    # One that is dead ended with its last sign.
    end = datetime.now(UTC).timestamp() - (0.0 if is_going else quiet or 0.0)
    ending = Ending(datetime.fromtimestamp(end, UTC), "running" if is_going else KILLED, step)
    saved = newest_saved(config.checkpoints(path), told.get("saved_step"), problems)
    saved_step = saved.step if saved else told.get("saved_step")
    accounted = closed(attempts, ending)
    times = wall_times(accounted, records, saved_step)
    per_step = _seconds_per_step(records, attempts)
    if state == RUNNING:
        problems += _worries(records, quiet, per_step, step - (saved_step or 0), config)
    if is_going:
        problems += _heartbeat(holder)
    problems += _history(path, record)
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
        attempts=attempts if is_going else accounted,
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
    recent = [record for record in records if record["step"] > first][-_RECENT_RECORDS:]
    if not recent:
        return None
    # The record before the recent ones tells where the first of them begins.
    before = [r for r in records if r["step"] < recent[0]["step"]][-1:]
    clock = step_clock([*before, *recent], first)
    start, end = int(before[0]["step"]) if before else first, int(recent[-1]["step"])
    return (clock(end) - clock(start)) / (end - start) or None


def _worries(
    records: Sequence[Record],
    quiet: float | None,
    per_step: float | None,
    unsaved: int,
    config: StoredConfig,
) -> Iterable[str]:
    """Yield what is odd about a run that goes on."""
    usual = (per_step or 0.0) * config.log_every
    if quiet is not None and quiet > max(_SILENT_SECONDS, _SILENT_RECORDS * usual):
        yield (
            f"no record for {quiet:.0f} s, where one comes every {usual:.0f} s: it evaluates, "
            "compiles, waits for storage, or hangs"
        )
    if config.save_every and unsaved > 2 * config.save_every:
        yield f"{unsaved} steps without a checkpoint, where every {config.save_every} one is due"
    # Of a single record it is chance.
    waits = [record.get("data_wait_fraction", 0.0) for record in records[-_RECENT_RECORDS:]]
    if waits and mean(waits) > _MUCH_WAITING:
        yield f"it waits for data {mean(waits):.0%} of the time"
    loss = records[-1].get("loss", 0.0) if records else 0.0
    if not math.isfinite(loss):
        yield f"the loss is {loss}"


def _heartbeat(holder: Holder | None) -> Iterable[str]:
    """Yield what the heartbeat of this node's training tells, where this is the run's node."""
    place = os.environ.get(HEARTBEAT)
    if place and holder and holder.is_alive is not None:
        is_well, told = check_heartbeat(Path(place), _HEARTBEAT_SECONDS)
        if not is_well:
            yield told


def _history(run_dir: Path, record: Record) -> Iterable[str]:
    """Yield what has gone wrong so far, and where to read more."""
    for key, what in (("skipped_steps", "updates skipped"), ("rollbacks", "rollbacks")):
        if count := record.get(key):
            yield f"{count:.0f} {what} so far"
    stacks = run_dir / "stacks"
    if stacks.is_dir() and (found := sum(1 for _ in stacks.iterdir())):
        yield f"{found} stacks of ranks in {stacks}"


def _newest(run_dir: Path, attempts: Sequence[Attempt]) -> Any:  # noqa: ANN401
    found = read_evaluations(run_dir, attempts)
    return max(found, key=lambda evaluation: evaluation.time, default=None)
