"""Mirror a run directory in MLflow from a thread, so that training never waits for a server.

The thread reads what the run writes and sends what the server does not have. The files are the
queue: an outage of any length loses nothing, memory stays flat, and the next job of a killed run,
or `dtr-scale tracking sync`, sends what was left.
"""

import logging
import threading
import time
from typing import TYPE_CHECKING

from dtr_scale.tracking.base import Tracker
from dtr_scale.tracking.description import RunInfo
from dtr_scale.tracking.journal import Record
from dtr_scale.tracking.uri import shown_uri, without_secrets

if TYPE_CHECKING:
    from dtr_scale.tracking.run import RunMirror

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 1.0, 60.0
_FINISH_SECONDS = 10.0
# The thread takes Python's lock from training for some 20 ms with each call, and many points cost
# a call hardly more than few.
_SECONDS_BETWEEN_SENDS = 5.0
# Commands on a run that still trains leave what they find in its directory.
_SECONDS_BETWEEN_LOOKS = 60.0


class MlflowTracker(Tracker):
    """One MLflow run, the same one after every restart, brought up to date by a thread."""

    def __init__(self, info: RunInfo) -> None:
        self._info = info
        self._place = f"MLflow at {shown_uri(info.uri)}"
        self._logged_step = info.description.step
        self._sent_step = 0
        self._is_away = False
        self._lacks_artifacts = False
        self._looked_at = 0.0
        # Two events: new work must not cut a pause short while the server is away, the end must.
        self._leaving = threading.Event()
        self._given_up = False
        self._work = threading.Event()
        self._there_is_more = threading.Event()
        self.look()
        # A daemon: a call that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._mirror, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        self._logged_step = int(record["step"])
        self._work.set()

    def look(self) -> None:
        self._there_is_more.set()
        self._work.set()

    def finish(self) -> None:
        deadline = time.monotonic() + _FINISH_SECONDS
        self._leaving.set()
        self.look()
        self._thread.join(min(1.0, _FINISH_SECONDS))
        if self._thread.is_alive():
            log.info("%s: sending the rest", self._place)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._given_up = True  # or it would go on for as long as the process lives
            log.warning(
                "%s has step %d of %d; %s has all, and the next start sends it, or: "
                "dtr-scale tracking sync %s",
                self._place,
                self._sent_step,
                self._logged_step,
                self._info.run_dir,
                self._info.run_dir,
            )

    def _mirror(self) -> None:
        """Send until the run is left and all is sent; back off while the server is away."""
        run: RunMirror | None = None
        is_told = False
        pause = _FIRST_RETRY_SECONDS
        while True:
            self._work.wait(_SECONDS_BETWEEN_LOOKS)
            # Cleared before reading: what is logged while we send sets it again.
            self._work.clear()
            # Read once: an end that comes while this round sends belongs to the next one.
            leaving = self._leaving.is_set()
            try:
                run = run or _open(self._info)
                if not is_told:
                    log.info("MLflow   %s", run.page)
                    is_told = True
                self._send(run)
            except Exception as error:  # whatever a server or a database does, training goes on
                run = None
                if self._given_up:
                    return
                self._warn(error)
                # Short pauses once the run is leaving: `finish` waits for 10 s.
                if self._leaving.wait(pause):
                    time.sleep(_FIRST_RETRY_SECONDS)
                pause = min(2 * pause, _LAST_RETRY_SECONDS)
                self.look()
                continue
            pause = _FIRST_RETRY_SECONDS
            if self._is_away:
                log.info("%s answers again", self._place)
            self._is_away = False
            if leaving:
                return
            self._leaving.wait(_SECONDS_BETWEEN_SENDS)

    def _send(self, run: "RunMirror") -> None:
        self._sent_step = run.send_journal()
        is_due = time.monotonic() > self._looked_at + _SECONDS_BETWEEN_LOOKS
        if self._there_is_more.is_set() or is_due:
            self._there_is_more.clear()
            self._looked_at = time.monotonic()
            run.send_figures()
            try:
                run.send_artifacts()
                self._lacks_artifacts = False
            except Exception as error:  # their store may be away, or closed to us, by itself
                if not self._lacks_artifacts:
                    reason = reason_of(error, self._info.uri)
                    log.warning("%s takes no pictures: %s", self._place, reason)
                self._lacks_artifacts = True

    def _warn(self, error: Exception) -> None:
        """Warn once in an outage."""
        if not self._is_away:
            reason = reason_of(error, self._info.uri)
            log.warning("%s: %s; the run directory keeps all, trying again", self._place, reason)
        self._is_away = True


def send_all(info: RunInfo) -> str:
    """Send everything in this thread; return the MLflow run's id. Raises what MLflow raises."""
    run = _open(info)
    run.send_journal()
    run.send_figures()
    run.send_artifacts()
    return run.run_id


def _open(info: RunInfo) -> "RunMirror":
    # Here, in the thread: the import of mlflow takes seconds.
    from dtr_scale.tracking.run import RunMirror

    return RunMirror(info)


def reason_of(error: Exception, uri: str) -> str:
    """Return why MLflow could not be reached, without what is secret in its address."""
    return without_secrets(_reason(error), uri)[:120]


def _reason(error: BaseException) -> str:
    """Return what went wrong in a few words, which are at the root of an error.

    requests tells "Connection refused" in 250 characters.
    """
    root = error
    while inner := root.__cause__ or root.__context__:
        root = inner
    words = getattr(root, "strerror", None) or min(str(error), str(root), key=len)
    return words.partition("\n")[0] or type(root).__name__
