"""The run directory: whose it is, what was asked for, how it ended."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dtr_scale.errors import ConfigError
from dtr_scale.storage.folder import open_folder
from dtr_scale.tracking.journal import last_step

log = logging.getLogger(__name__)

CONFIG, STATUS, JOURNAL, LOCK = "config.json", "status.json", "journal.jsonl", "lock"
CHECKPOINTS, SAMPLES = "checkpoints", "samples"
_OF_ONE_RUN = (CONFIG, STATUS, JOURNAL, CHECKPOINTS, SAMPLES, "mlflow.json", "evaluation.json")
_LOCK_PATIENCE_SECONDS = 20.0


class RunDirectory:
    """A run's directory, held by one job at a time; rank 0 of the job makes one of these.

    Raises ConfigError if the directory cannot be written, or another job holds it. The lock is the
    kernel's: it goes with the process that holds it, however that ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._writing():
            (path / SAMPLES).mkdir(parents=True, exist_ok=True)
            self._lock = (path / LOCK).open("a+", encoding="utf-8")
        self._take_lock()
        self.saved_step = _saved_step(path)
        """Step of the newest checkpoint that earlier jobs have told of, if any."""
        with self._writing():
            write_status(path, "running")

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL

    def write_config(self, config: dict[str, Any]) -> None:
        _write_json(self.path, CONFIG, config)

    def set_aside(self) -> Path | None:
        """Move an earlier run out of the way, losing nothing.

        Returns where it is now, a run directory of its own; None if nothing had been trained.
        """
        if not (self.path / JOURNAL).exists() and not open_folder(self.path / CHECKPOINTS).names():
            return None
        present = [name for name in _OF_ONE_RUN if (self.path / name).exists()]
        place = self.path / f"replaced_{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
        place.mkdir()
        for name in present:
            (self.path / name).rename(place / name)
        (self.path / SAMPLES).mkdir()
        return place

    def close(self) -> None:
        self._lock.close()

    def _take_lock(self) -> None:
        """Take the lock, waiting a little for a job that is just leaving."""
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._lock.seek(0)
                    holder = self._lock.read().strip()
                    self._lock.close()
                    raise ConfigError(
                        f"run_dir = {str(self.path)!r} is in use by {holder}; "
                        "wait for that job, stop it, or choose another with --run_dir=PATH"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                log.warning("%s cannot be locked (%s); start no second job there", self.path, error)
                break
        self._lock.truncate(0)
        self._lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

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
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"outcome": outcome, "reason": reason, "step": step, "saved_step": saved_step}
    _write_json(run_path, STATUS, content | {"time": now})


def _saved_step(run_path: Path) -> int | None:
    try:
        return json.loads((run_path / STATUS).read_text(encoding="utf-8")).get("saved_step")
    except (OSError, ValueError):
        return None


def write_failure(run_path: Path, reason: str) -> bool:
    """Store that the run has failed, unless a rank has already; return whether it was news.

    Any rank may be the one that is left to tell it, and several find out at the same time.
    """
    with ExitStack() as stack, contextlib.suppress(OSError):  # the failure itself matters more
        folder = os.open(run_path, os.O_RDONLY)
        stack.callback(os.close, folder)
        with contextlib.suppress(OSError):  # not every file system locks folders
            fcntl.flock(folder, fcntl.LOCK_EX)
        if json.loads((run_path / STATUS).read_bytes())["outcome"] == "failed":
            return False
        write_status(run_path, "failed", reason=reason)
    return True


def _write_json(folder: Path, name: str, content: dict[str, Any]) -> None:
    open_folder(folder).write_bytes(name, json.dumps(content, indent=2).encode() + b"\n")
