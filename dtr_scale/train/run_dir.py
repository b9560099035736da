"""The run directory: whose it is, what was asked for, how it ended."""

import fcntl
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dtr_scale.errors import ConfigError
from dtr_scale.storage import Folder

CONFIG, STATUS, JOURNAL, LOCK = "config.json", "status.json", "journal.jsonl", "lock"
CHECKPOINTS, SAMPLES = "checkpoints", "samples"
_LOCK_PATIENCE_SECONDS = 20.0


class RunDirectory:
    """A run's directory, held by one job at a time; rank 0 of the job makes one of these.

    Raises ConfigError if the directory cannot be written, or another job holds it. The lock is the
    kernel's: it goes with the process that holds it, however that ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = Folder(path)
        try:
            (path / SAMPLES).mkdir(parents=True, exist_ok=True)
            self._lock = (path / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"run_dir = {str(path)!r} cannot be written: {error.strerror}; "
                "choose another with --run_dir=PATH"
            ) from None
        self._take_lock()

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL

    def write_config(self, config: dict[str, Any]) -> None:
        self._write_json(CONFIG, config)

    def write_status(self, outcome: str, *, step: int, reason: str = "") -> None:
        """Store how the run stands: running, finished, preempted or failed, and why."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._write_json(STATUS, {"outcome": outcome, "reason": reason, "step": step, "time": now})

    def set_aside(self) -> Path | None:
        """Move an earlier run's journal, checkpoints and MLflow id out of the way, losing nothing.

        Returns where they are now; None if there was nothing.
        """
        names = (JOURNAL, CHECKPOINTS, "mlflow.json")
        present = [name for name in names if (self.path / name).exists()]
        if not present:
            return None
        place = self.path / f"replaced_{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
        place.mkdir()
        for name in present:
            (self.path / name).rename(place / name)
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
                    raise ConfigError(
                        f"run_dir = {str(self.path)!r} is in use by {self._lock.read().strip()}; "
                        "wait for that job, stop it, or choose another with --run_dir=PATH"
                    ) from None
                time.sleep(0.2)
        self._lock.truncate(0)
        self._lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        self._folder.write_bytes(name, json.dumps(content, indent=2).encode() + b"\n")
