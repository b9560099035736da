"""Tell what is odd about a run, by its records and files."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from dtr_scale.checkpoint.lease import Holder
from dtr_scale.heartbeat import HEARTBEAT, check_heartbeat
from dtr_scale.jobs.status.stored import StoredConfig
from dtr_scale.storage.folder import open_folder
from dtr_scale.tracking.journal import Record

RECENT_RECORDS = 50

_HEARTBEAT_SECONDS = 300.0
_SILENT_SECONDS, _SILENT_RECORDS = 120.0, 10
_MUCH_WAITING = 0.2
_SLOW = 1.5


def worries(
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
    waits = [record.get("data_wait_fraction", 0.0) for record in records[-RECENT_RECORDS:]]
    if waits and mean(waits) > _MUCH_WAITING:
        yield f"it waits for data {mean(waits):.0%} of the time"
    yield from _slow_rank(records[-2:])
    loss = records[-1].get("loss", 0.0) if records else 0.0
    if not math.isfinite(loss):
        yield f"the loss is {loss}"


def _slow_rank(records: Sequence[Record]) -> Iterable[str]:
    """Yield the rank that was an outlier in two records in a row, as the log does with its host."""
    ranks = {record.get("slowest_rank") for record in records}
    times = [
        (record.get("slowest_rank_seconds", 0.0), record.get("median_rank_seconds", 0.0))
        for record in records
    ]
    if len(records) == 2 and len(ranks) == 1 and all(slow > _SLOW * usual for slow, usual in times):
        slow, usual = times[-1]
        yield (
            f"rank {ranks.pop():.0f} is slow: {slow:.3g} s a step of its own, where the median is "
            f"{usual:.3g} s; the log names its host"
        )


def heartbeat(holder: Holder | None) -> Iterable[str]:
    """Yield what the heartbeat of this node's training tells, where this is the run's node."""
    place = os.environ.get(HEARTBEAT)
    if place and holder and holder.is_alive is not None:
        is_well, told = check_heartbeat(Path(place), _HEARTBEAT_SECONDS)
        if not is_well:
            yield told


def history(run_dir: Path, record: Record) -> Iterable[str]:
    """Yield what has gone wrong so far, and where to read more."""
    for key, what in (("skipped_steps", "updates skipped"), ("rollbacks", "rollbacks")):
        if count := record.get(key):
            yield f"{count:.0f} {what} so far"
    # Each rank has its file ready from the start.
    stacks = open_folder(run_dir / "stacks")
    if filled := sum(size > 0 for size in stacks.sizes().values()):
        yield f"stacks that ranks left at a hang or a failure: {filled} in {stacks.url}"
