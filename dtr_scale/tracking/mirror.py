"""Mirror a run's journal in MLflow from a thread, so that training never waits for a server.

The thread reads the journal file and sends what the server does not have. The file is the queue:
an outage of any length loses no record, memory stays flat, and the next job of a killed run sends
what was left.
"""

import logging
import math
import threading
import time
from pathlib import Path

from dtr_scale.tracking.base import Tracker
from dtr_scale.tracking.journal import Record
from dtr_scale.tracking.mlflow import Evaluation, MlflowRun, RunInfo
from dtr_scale.tracking.uri import shown_uri, without_secrets

log = logging.getLogger(__name__)

_OUTCOME_STATUS = {"finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 1.0, 60.0
_SECONDS_BETWEEN_WARNINGS = 60.0
_FINISH_SECONDS, _FINISH_SECONDS_IF_AWAY = 60.0, 10.0


class MlflowTracker(Tracker):
    """One MLflow run, the same one after every restart: mlflow.json keeps its id."""

    def __init__(self, run: RunInfo) -> None:
        self._run = run
        self._place = f"MLflow at {shown_uri(run.uri)}"
        # Never emptied: a new MLflow run gets all of them again. The thread only reads it.
        self._evaluations: list[Evaluation] = []
        self._ending: tuple[str, str | None] | None = None
        self._logged_step = run.step
        self._sent_step = 0
        self._is_away = False
        self._warned_at = -math.inf
        # Two events: new work must not cut a pause short while the server is away, the end must.
        self._leaving = threading.Event()
        self._work = threading.Event()
        self._work.set()
        # A daemon: a call that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._mirror, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        self._logged_step = int(record["step"])
        self._work.set()

    def log_evaluation(self, step: int, metrics: Record, picture: Path) -> None:
        self._evaluations.append(Evaluation(_now_ms(), step, metrics, picture))
        self._work.set()

    def finish(self, outcome: str, checkpoint_url: str | None) -> None:
        start = time.monotonic()
        self._ending = (_OUTCOME_STATUS[outcome], checkpoint_url)
        self._leaving.set()
        self._work.set()
        self._thread.join(min(1.0, _FINISH_SECONDS))
        if self._thread.is_alive():
            log.info("%s: sending the last records", self._place)
        # Asked again and again: the server may turn out to be away just now.
        while self._thread.is_alive() and time.monotonic() < start + self._patience():
            self._thread.join(0.1)
        if self._thread.is_alive():
            log.warning(
                "%s has step %d of %d; the journal %s has them all and is sent at the next start",
                self._place,
                self._sent_step,
                self._logged_step,
                self._run.journal,
            )

    def _patience(self) -> float:
        return _FINISH_SECONDS_IF_AWAY if self._is_away else _FINISH_SECONDS

    def _mirror(self) -> None:
        """Send until the run has ended and all is sent; back off while the server is away."""
        run: MlflowRun | None = None
        pause = _FIRST_RETRY_SECONDS
        while True:
            self._work.wait()
            # Cleared before reading: what is logged while we send sets it again.
            self._work.clear()
            # Read once: an end that comes while this round sends belongs to the next one.
            ending = self._ending
            try:
                run = run or MlflowRun(self._run)
                self._send(run, ending)
            except Exception as error:  # whatever a server or a database does, training goes on
                run = None
                self._warn(error)
                # Short pauses once the run is leaving: `finish` gives an absent server 10 s.
                if self._leaving.wait(pause):
                    time.sleep(_FIRST_RETRY_SECONDS)
                pause = min(2 * pause, _LAST_RETRY_SECONDS)
                self._work.set()
                continue
            pause = _FIRST_RETRY_SECONDS
            if self._is_away:
                log.info("%s answers again", self._place)
            self._is_away = False
            if ending:
                return

    def _send(self, run: MlflowRun, ending: tuple[str, str | None] | None) -> None:
        self._sent_step = run.send_journal()
        if ending:  # before the pictures, which may have nowhere to go
            run.end(*ending)
        run.send_evaluations(self._evaluations)

    def _warn(self, error: Exception) -> None:
        if time.monotonic() > self._warned_at + _SECONDS_BETWEEN_WARNINGS:
            self._warned_at = time.monotonic()
            reason = without_secrets(_reason(error), self._run.uri)[:120]
            log.warning("%s: %s; the journal keeps all, trying again", self._place, reason)
        # After the warning: `finish` may end the process as soon as it reads this.
        self._is_away = True


def _reason(error: BaseException) -> str:
    """Return what went wrong in a few words, which are at the root of an error.

    requests tells "Connection refused" in 250 characters.
    """
    root = error
    while inner := root.__cause__ or root.__context__:
        root = inner
    words = getattr(root, "strerror", None) or min(str(error), str(root), key=len)
    return words.partition("\n")[0] or type(root).__name__


def _now_ms() -> int:
    return int(time.time() * 1000)
