"""Keep a run's directory: the job that holds it, the run's config and its outcome."""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dtr_scale.checkpoint.lease import Lease
from dtr_scale.errors import CheckpointError, ConfigError
from dtr_scale.storage.folder import Folder, open_folder
from dtr_scale.tracking.attempts import ATTEMPTS
from dtr_scale.tracking.description import DESCRIPTION
from dtr_scale.tracking.goodput import Ending, read_goodput
from dtr_scale.tracking.journal import last_step
from dtr_scale.tracking.prometheus import METRICS_FILE
from dtr_scale.tracking.run_file import RUN_FILE

log = logging.getLogger(__name__)

CONFIG, STATUS, JOURNAL, LOCK = "config.json", "status.json", "journal.jsonl", "lock"
CHECKPOINTS, SAMPLES, SKIPPED = "checkpoints", "samples", "skipped.jsonl"
OWNER = "owner.json"
"""In the folder of the checkpoints, what LOCK is in the run directory."""
TRAINING = "training.json"
"""Beside it: the id by which MLflow knows the training, wherever it goes on."""
# LOCK stays where it is: it belongs to the job, whichever run is in the directory.
_OF_ONE_RUN = (
    CONFIG,
    STATUS,
    JOURNAL,
    CHECKPOINTS,
    SAMPLES,
    ATTEMPTS,
    DESCRIPTION,
    RUN_FILE,
    "stacks",
    "evaluation.json",
    "evaluations.jsonl",
    METRICS_FILE,
    SKIPPED,
)


class RunDirectory:
    """A run's directory, held by one job at a time; rank 0 of the job makes one of these.

    Raises ConfigError if the directory cannot be written, or another job holds it. `lost` is called
    from a thread with a message if another job has taken over what this one holds.
    """

    def __init__(self, path: Path, lost: Callable[[str], None] = log.error) -> None:
        self.path = path
        self._lost = lost
        # From the deepest up, as they can be removed again if the start is refused.
        self._made = [p for p in (path, *path.parents) if not p.exists()]
        self._is_new = not (path / STATUS).exists()
        self._has_begun = False
        self._leases: list[Lease] = []
        with self._writing():
            (path / SAMPLES).mkdir(parents=True, exist_ok=True)
            # Before status.json is read: the job before may still write it.
            self._run_lease = self._take(open_folder(path), LOCK, key="run_dir")
        self.saved_step = _saved_step(path)
        """Step of the newest checkpoint that earlier jobs have told of, if any."""
        self.status_before = find_object(path / STATUS)
        """What the job before has told of its end; {} if there was none."""
        with self._writing():
            write_status(path, "running")

    def hold_checkpoints(self, folder: Folder) -> None:
        """Hold the folder of this run's checkpoints, too; ConfigError if it is another run's."""
        run = self._run_lease
        try:
            self.checkpoint_lease = self._take(
                folder, OWNER, key="checkpoint.dir", run=run.run, is_new_run=run.created
            )
        except OSError as error:
            raise CheckpointError(
                f"cannot save {folder.url}: {error}; give another checkpoint.dir"
            ) from error
        # A new run directory of a run that has begun on another node.
        run.run = self.checkpoint_lease.run

    def _take(self, folder: Folder, name: str, *, key: str, **run: Any) -> Lease:  # noqa: ANN401
        lease = Lease(folder, name, key=key, run_dir=self.path, lost=self._lost)
        lease.take(**run)
        self._leases.append(lease)
        return lease

    @property
    def job(self) -> str:
        """Which job holds the directory; each start is one of its own."""
        return self._run_lease.job

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL

    def write_config(self, config: dict[str, Any]) -> None:
        self._has_begun = True
        _write_json(self.path, CONFIG, config)

    def set_aside(self) -> Path | None:
        """Move an earlier run out of the way, losing nothing.

        Returns where it is now, a run directory of its own; None if nothing had been trained.
        """
        checkpoints = set(open_folder(self.path / CHECKPOINTS).names()) - {OWNER, TRAINING}
        if not (self.path / JOURNAL).exists() and not checkpoints:
            return None
        present = [name for name in _OF_ONE_RUN if (self.path / name).exists()]
        place = self.path / f"replaced_{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
        place.mkdir()
        for name in present:
            (self.path / name).rename(place / name)
        # It names this directory; the next renewal makes another one here.
        (place / CHECKPOINTS / OWNER).unlink(missing_ok=True)
        (self.path / SAMPLES).mkdir()
        return place

    def close(self, *, refused: bool = False) -> None:
        """Let go of what is held; a start that was `refused` leaves nothing that was not there."""
        forget = refused and not self._has_begun
        # The run directory's last: whoever waits for that one then finds the checkpoints free, too.
        for lease in reversed(self._leases):
            lease.release(forget=forget)
        if forget and self._is_new:
            self._remove_traces()

    def _remove_traces(self) -> None:
        # Another rank may be telling here that it has failed, see `write_failure`.
        with contextlib.suppress(OSError), _locked(self.path):
            (self.path / STATUS).unlink(missing_ok=True)
            for folder in (self.path / SAMPLES, self.path / CHECKPOINTS, *self._made):
                with contextlib.suppress(FileNotFoundError):
                    folder.rmdir()  # only where it is empty

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"run_dir = {str(self.path)!r} cannot be written: {error.strerror}; "
                "choose another with --run_dir=PATH"
            ) from None


def write_status(
    run_path: Path,
    outcome: str,
    *,
    step: int | None = None,
    saved_step: int | None = None,
    reason: str = "",
) -> None:
    """Store how a run stands: running, finished, preempted or failed, and why.

    Without a step it is that of the journal's last line, without a saved step that told before.
    """
    if step is None:
        step = last_step(run_path / JOURNAL)
    if saved_step is None:
        saved_step = _saved_step(run_path)
    content = {"outcome": outcome, "reason": reason, "step": step, "saved_step": saved_step}
    now = datetime.now(UTC)
    if outcome != "running":
        goodput = goodput_of(run_path, saved_step, now, outcome, step)
        content |= {"attempt_goodput": goodput[0], "goodput": goodput[1]} if goodput else {}
    _write_json(run_path, STATUS, content | {"time": now.isoformat(timespec="seconds")})


def goodput_of(
    run_path: Path, saved_step: int | None, end: datetime, outcome: str, step: int
) -> tuple[float, float] | None:
    """Return the goodput of a run's last attempt, and of the run; None where nothing tells it.

    An attempt that goes on is taken to end so. Of one that does not tell a clean end, the steps up
    to `saved_step` count.
    """
    journal = run_path / JOURNAL
    return read_goodput(run_path, journal, Ending(end, outcome, step), saved_step)


def _saved_step(run_path: Path) -> int | None:
    return find_object(run_path / STATUS).get("saved_step")


def write_saved_step(run_path: Path, step: int) -> None:
    """Store the step of the newest checkpoint; how the run stands stays as it is."""
    with _locked(run_path):  # the main thread may be telling of a failure at this moment
        content = {"outcome": "running", "reason": ""} | _read_object(run_path / STATUS)
        content |= {"step": max(content.get("step") or 0, step), "saved_step": step}
        _write_json(run_path, STATUS, content | {"time": _now()})


def write_failure(run_path: Path, reason: str, job: str | None = None) -> bool:
    """Store that the run has failed, unless a rank has already; return whether it was news.

    Any rank may be the one that is left to tell it, and several find out at the same time. Nothing
    is written where another job than `job` holds the directory by now: the run goes on there.
    """
    with contextlib.suppress(OSError), _locked(run_path):  # the failure itself matters more
        if job is not None and _holder(run_path) not in (None, job):
            return False
        if _read_object(run_path / STATUS).get("outcome") == "failed":
            return False
        write_status(run_path, "failed", reason=reason)
    return True


def _holder(run_path: Path) -> str | None:
    """Return the job that holds a run directory, None if none does or that cannot be read."""
    return find_object(run_path / LOCK).get("job")


def find_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file tells; {} if it is no object, or is not there to be read."""
    try:
        return _read_object(path)
    except OSError:
        return {}


def _read_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file tells; {} if it is no object: a disk or a hand has damaged it."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other threads and ranks of this machine out, where the file system locks folders."""
    # The folder, not status.json: every write replaces that file, and a lock on it would go with
    # the old one.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_json(folder: Path, name: str, content: dict[str, Any]) -> None:
    open_folder(folder).write_bytes(name, json.dumps(content, indent=2).encode() + b"\n")
