"""Mirror of the journal in MLflow. The only module that imports mlflow.

A thread reads the journal file and sends what the server does not have yet. The file is the
queue: an outage of any length loses nothing, memory stays flat, and a killed run's successor
sends what was left. Training never waits for a server.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtr_scale.logs import without_password
from dtr_scale.storage.folder import open_folder
from dtr_scale.tracking.base import Tracker
from dtr_scale.tracking.journal import Record, read_new_records

log = logging.getLogger(__name__)

RUN_FILE = "mlflow.json"
_OUTCOME_STATUS = {"finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}
_METRICS_PER_CALL = 1000  # MLflow's own limit
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 1.0, 60.0
_FINISH_SECONDS = 60.0


def tracking_uri(configured: str | None, run_dir: Path) -> str:
    """Return the configured server, else the environment's, else a sqlite file of the run."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or _own_database(run_dir)


def _own_database(run_dir: Path) -> str:
    return f"sqlite:///{(run_dir / 'mlflow.db').resolve()}"


class MlflowTracker(Tracker):
    """One MLflow run, the same one after every restart: its id is kept in mlflow.json."""

    def __init__(
        self,
        *,
        run_dir: Path,
        journal: Path,
        uri: str | None,
        experiment: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        self._run_dir = run_dir
        self._journal = journal
        self._uri = tracking_uri(uri, run_dir)
        self._shown_uri = without_password(self._uri)
        self._experiment = experiment
        self._name = name
        self._params = params
        self._tags = tags
        self._artifact_root = (run_dir / "mlflow_artifacts").resolve().as_uri()
        self._evaluations: list[tuple[int, int, Record, Path]] = []
        self._status: tuple[str, str | None] | None = None
        self._ending = threading.Event()
        self._changed = threading.Event()
        self._changed.set()
        self._thread = threading.Thread(target=self._mirror, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        self._changed.set()

    def log_evaluation(self, step: int, metrics: Record, picture: Path) -> None:
        self._evaluations.append((_now(), step, metrics, picture))
        self._changed.set()

    def finish(self, outcome: str, checkpoint_url: str | None) -> None:
        self._status = (_OUTCOME_STATUS[outcome], checkpoint_url)
        self._ending.set()
        self._changed.set()
        self._thread.join(_FINISH_SECONDS)
        if self._thread.is_alive():
            log.warning(
                "MLflow at %s did not take the last records; the journal %s has them all, and the "
                "next start of this run sends them",
                self._shown_uri,
                self._journal,
            )

    def _mirror(self) -> None:
        """Send until the run has ended and all is sent; back off while the server is away."""
        session: _Session | None = None
        sent_bytes = 0
        pause = _FIRST_RETRY_SECONDS
        while True:
            self._changed.wait()
            self._changed.clear()
            ending = self._status
            try:
                session = session or self._open_session()
                records, end = read_new_records(self._journal, sent_bytes)
                session.send(records)
                sent_bytes = end
                if ending:  # before the pictures: they may have nowhere to go
                    session.end(*ending)
                while self._evaluations:
                    session.send_evaluation(*self._evaluations[0])
                    del self._evaluations[0]
                if ending:
                    return
                pause = _FIRST_RETRY_SECONDS
            except Exception as error:  # whatever a server or a database does, training goes on
                session = None  # the server may have taken what it did not confirm: ask it
                pause = _FIRST_RETRY_SECONDS if ending else pause
                self._warn(error, pause)
                if self._ending.wait(pause):
                    time.sleep(_FIRST_RETRY_SECONDS)
                pause = min(2 * pause, _LAST_RETRY_SECONDS)
                self._changed.set()

    def _warn(self, error: Exception, pause: float) -> None:
        reason = str(error).partition("\n")[0].replace(self._uri, self._shown_uri)[:200]
        log.warning("MLflow at %s: %s; trying again in %.0f s", self._shown_uri, reason, pause)

    def _open_session(self) -> "_Session":
        # A dead server would hold each call for minutes, and the usage report calls out.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        # It tells of every table it makes, whatever MLFLOW_LOGGING_LEVEL says.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        client = MlflowClient(self._uri)
        run_id = self._kept_run_id() or self._create_run(client)
        session = _Session(client, run_id)
        session.describe(self._params, self._tags)
        return session

    def _kept_run_id(self) -> str | None:
        path = self._run_dir / RUN_FILE
        if not path.exists():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        # The run's own database goes with its directory, wherever that is moved.
        owned = self._uri == _own_database(self._run_dir) and kept["tracking_uri"] is None
        return kept["run_id"] if owned or kept["tracking_uri"] == self._shown_uri else None

    def _create_run(self, client: Any) -> str:  # noqa: ANN401
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            # Beside a local database, pictures stay in the run directory too.
            place = self._artifact_root if self._uri.startswith("sqlite:") else None
            experiment_id = client.create_experiment(self._experiment, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
        run_id = client.create_run(experiment_id, run_name=self._name).info.run_id
        own = self._uri == _own_database(self._run_dir)
        kept_uri = None if own else self._shown_uri
        content = {"run_id": run_id, "tracking_uri": kept_uri, "experiment": self._experiment}
        text = json.dumps(content, indent=2) + "\n"
        open_folder(self._run_dir).write_bytes(RUN_FILE, text.encode())
        return run_id


class _Session:
    """A run on a server that answers: it knows the last step that the server has."""

    def __init__(self, client: Any, run_id: str) -> None:  # noqa: ANN401
        self._client = client
        self._run_id = run_id
        client.update_run(run_id, status="RUNNING")
        # Points of a step that is sent twice would stand beside each other for ever.
        history = client.get_metric_history(run_id, "loss")
        self._last_step = max((point.step for point in history), default=0)

    def describe(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Set the tags, and the params that the run does not have: MLflow never changes one."""
        from mlflow.entities import Param, RunTag

        present = self._client.get_run(self._run_id).data.params
        named = {key.lstrip("$"): str(value) for key, value in params.items()}
        self._client.log_batch(
            self._run_id,
            params=[Param(key, value) for key, value in named.items() if key not in present],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )

    def send(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        batch: list[Any] = []
        now = _now()
        for record in records:
            step = int(record["step"])
            if step <= self._last_step:
                continue
            points = [Metric(k, float(v), now, step) for k, v in record.items() if k != "step"]
            if len(batch) + len(points) > _METRICS_PER_CALL:
                self._send_batch(batch)
                batch = []
            batch += points
        if batch:
            self._send_batch(batch)

    def _send_batch(self, batch: list[Any]) -> None:
        self._client.log_batch(self._run_id, metrics=batch)
        self._last_step = batch[-1].step

    def send_evaluation(self, time_ms: int, step: int, metrics: Record, picture: Path) -> None:
        for key, value in metrics.items():  # a point of the same time is the same point
            self._client.log_metric(self._run_id, key, value, timestamp=time_ms, step=step)
        self._client.log_artifact(self._run_id, str(picture), "samples")

    def end(self, status: str, checkpoint_url: str | None) -> None:
        if checkpoint_url:
            self._client.set_tag(self._run_id, "checkpoint", checkpoint_url)
        self._client.set_terminated(self._run_id, status)


def _now() -> int:
    return int(time.time() * 1000)
