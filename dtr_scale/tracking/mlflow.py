"""Send a run's journal and evaluations to MLflow. The only module that imports mlflow.

MLflow never deletes a point and never changes a param. So a step is sent once, and a journal that
went back to an older checkpoint and took another way from there gets a new MLflow run. The old
one is renamed and tagged `superseded_by`.
"""

import logging
import math
import os
import posixpath
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr_scale.tracking.journal import Record, read_journal, read_new_records
from dtr_scale.tracking.names import valid_names
from dtr_scale.tracking.run_file import read_run_file, write_run_file

log = logging.getLogger(__name__)

_METRICS_PER_CALL, _PARAMS_PER_CALL = 1000, 100  # MLflow's own limits
_PARAM_CHARACTERS = 6000
_PICTURES = "samples"


@dataclass(frozen=True)
class RunInfo:
    """A job's run as MLflow is told of it, and the server's address."""

    run_dir: Path
    journal: Path
    uri: str
    experiment: str
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    step: int
    """The step that the job goes on from."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics and a picture of one step, with their time."""

    time_ms: int
    step: int
    metrics: Record
    picture: Path


class MlflowRun:
    """A run on a server that answers. It asks what the server has, and sends the rest.

    After any error make a new one: the server may have taken what it did not confirm.
    """

    def __init__(self, info: RunInfo) -> None:
        self._info = info
        self._client = open_client(info.uri)
        kept = self._kept()
        self._run_id = kept["run_id"] if kept else self._create()
        self._begin(kept.get("continues") if kept else None)

    def send_journal(self) -> int:
        """Send the records that the server does not have; return the last step that it has."""
        records, end = read_new_records(self._info.journal, self._sent_bytes)
        unsent = self._after_known(records)
        if unsent is None:
            self._begin_another_run()
            unsent, end = read_new_records(self._info.journal, 0)
        self._send(unsent)
        self._sent_bytes = end
        self._last_step = int(records[-1]["step"]) if records else self._last_step
        return self._last_step

    def send_evaluations(self, evaluations: list[Evaluation]) -> None:
        """Send those of a job's evaluations that the server does not have."""
        unsent = evaluations[self._num_evaluations :]
        pictures = self._pictures() if unsent else set()
        for evaluation in unsent:
            for name, value in valid_names(evaluation.metrics).items():
                # MLflow would keep a second point of the step beside the first.
                steps = self._evaluated.setdefault(name, self._steps_of(name))
                if evaluation.step not in steps:
                    self._log(metrics=[_metric(name, value, evaluation.time_ms, evaluation.step)])
                    steps.add(evaluation.step)
            if evaluation.picture.name not in pictures:
                self._client.log_artifact(self._run_id, str(evaluation.picture), _PICTURES)
            self._num_evaluations += 1

    def end(self, status: str, checkpoint_url: str | None) -> None:
        if checkpoint_url:
            self._client.set_tag(self._run_id, "checkpoint", checkpoint_url)
        self._client.set_terminated(self._run_id, status)

    def _begin(self, continues: dict[str, Any] | None) -> None:
        # The job before may have ended it, and a kill leaves it RUNNING for ever.
        self._client.update_run(self._run_id, status="RUNNING")
        self._describe()
        history = self._client.get_metric_history(self._run_id, "loss")
        if continues and not history:  # no journal yet: this run was made a moment ago
            self._continue(**continues)
        self._known = deque(sorted((point.step, point.value) for point in history))
        self._sent_bytes = 0
        self._last_step = 0
        self._evaluated: dict[str, set[int]] = {}
        self._num_evaluations = 0

    def _after_known(self, records: list[Record]) -> list[Record] | None:
        """Return the records after those that the server has, None if it has others.

        A run that goes on from its checkpoint after a kill repeats its steps to the last bit, and
        its points are already there. The loss tells: it is of every record.
        """
        for index, record in enumerate(records):
            if not self._known:
                return records[index:]
            step, loss = self._known.popleft()
            if step != record["step"] or not _same(loss, record["loss"]):
                return None
        return []

    def _begin_another_run(self) -> None:
        continues = {"run_id": self._run_id, "step": self._info.step}
        log.info(
            "MLflow has other figures after step %d than the journal; a new run there takes its "
            "place, with all steps",
            self._info.step,
        )
        self._run_id = self._create(continues)
        self._begin(continues)

    def _continue(self, run_id: str, step: int) -> None:
        """Mark the run that this one continues, and copy its evaluations up to `step`.

        They are not in the journal. A copied point has its old time: sent again, it is the same.
        """
        client, name = self._client, f"{self._info.name} (superseded at step {step})"
        old = client.get_run(run_id)
        of_journal = {key for record in read_journal(self._info.journal) for key in record}
        for key in old.data.metrics.keys() - valid_names(dict.fromkeys(of_journal)).keys():
            history = client.get_metric_history(run_id, key)
            points = (p for p in history if p.step <= step)
            self._log(metrics=[_metric(key, p.value, p.timestamp, p.step) for p in points])
        for tag, text in old.data.tags.items():
            # The changes of this job, noted before its figures showed that it went another way.
            if tag.startswith("changed.") and text.endswith(f" from step {step}"):
                earlier = text.rpartition("; ")[0]
                client.set_tag(run_id, tag, earlier) if earlier else client.delete_tag(run_id, tag)
        client.set_tag(run_id, "superseded_by", self._run_id)
        client.set_tag(run_id, "superseded_at_step", str(step))
        client.update_run(run_id, name=name)
        if old.info.status == "RUNNING":
            client.set_terminated(run_id, "KILLED")

    def _describe(self) -> None:
        """Set the tags, and the params that the run does not have.

        A param that has changed since is told by a tag: `changed.train.lr`.
        """
        from mlflow.entities import Param, RunTag

        data = self._client.get_run(self._run_id).data
        params, tags = [], [RunTag(k, str(v)) for k, v in valid_names(self._info.tags).items()]
        for name, param in valid_names(self._info.params).items():
            # MLflow would cut it in silence, and it would look changed at every start.
            value = str(param)[:_PARAM_CHARACTERS]
            if name not in data.params:
                params.append(Param(name, value))
                continue
            tag = f"changed.{name}"
            before = data.tags.get(tag)
            if value != _last_value(before, data.params[name]):
                now = f"{value} from step {self._info.step}"
                tags.append(RunTag(tag, f"{before}; {now}" if before else now))
        self._log(params=params, tags=tags)

    def _send(self, records: Iterable[Record]) -> None:
        batch: list[Any] = []
        now = int(time.time() * 1000)
        for record in records:
            step = int(record["step"])
            figures = valid_names({k: v for k, v in record.items() if k != "step"})
            # The points of a step go in one call: `_after_known` takes its loss for all of them.
            if len(batch) + len(figures) > _METRICS_PER_CALL:
                self._log(metrics=batch)
                batch = []
            batch += [_metric(name, value, now, step) for name, value in figures.items()]
        self._log(metrics=batch)

    def _log(self, **entries: list[Any]) -> None:
        """Send metrics, params or tags; what the server refuses costs no other its place."""
        from mlflow.exceptions import MlflowException

        for kind, all_of_kind in entries.items():
            most = _METRICS_PER_CALL if kind == "metrics" else _PARAMS_PER_CALL
            for start in range(0, len(all_of_kind), most):
                part = all_of_kind[start : start + most]
                try:
                    self._client.log_batch(self._run_id, **{kind: part})
                except MlflowException as error:
                    if error.error_code != "INVALID_PARAMETER_VALUE":
                        raise
                    if len(part) == 1:
                        log.warning("MLflow takes no %s %r", kind.rstrip("s"), part[0].key)
                        continue
                    # One by one: a call fails as a whole, and the others are valid.
                    for entry in part:
                        self._log(**{kind: [entry]})

    def _steps_of(self, name: str) -> set[int]:
        return {point.step for point in self._client.get_metric_history(self._run_id, name)}

    def _pictures(self) -> set[str]:
        listed = self._client.list_artifacts(self._run_id, _PICTURES)
        return {posixpath.basename(file.path) for file in listed}

    def _kept(self) -> dict[str, Any] | None:
        """Return what mlflow.json says of this run on this server, if the server still has it."""
        from mlflow.exceptions import MlflowException

        kept = read_run_file(self._info.run_dir, self._info.uri)
        if kept is None:
            return None
        try:
            gone = self._client.get_run(kept["run_id"]).info.lifecycle_stage != "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            gone = True
        if gone:
            log.warning("MLflow no longer has run %s; it gets a new one", kept["run_id"])
        return None if gone else kept

    def _create(self, continues: dict[str, Any] | None = None) -> str:
        info, client = self._info, self._client
        experiment = client.get_experiment_by_name(info.experiment)
        if experiment is None:
            # Beside a local database, pictures stay in the run directory too.
            is_local = info.uri.startswith("sqlite:")
            place = (info.run_dir / "mlflow_artifacts").resolve().as_uri() if is_local else None
            experiment_id = client.create_experiment(info.experiment, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
        tags = {}
        if continues:
            tags = {"continues": continues["run_id"], "continues_at_step": str(continues["step"])}
        run_id = client.create_run(experiment_id, run_name=info.name, tags=tags).info.run_id
        content = {"run_id": run_id, "experiment": info.experiment, "continues": continues}
        write_run_file(info.run_dir, info.uri, content)
        return run_id


def open_client(uri: str) -> Any:  # noqa: ANN401
    """Return MLflow's client, set up so that it is quick to give up and keeps quiet."""
    # A dead server would hold each call for minutes, the usage report calls out, and the link to
    # a run that has ended is printed with the password of its server.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    from mlflow import MlflowClient

    # MLflow tells of every table it makes and of every retry, whatever MLFLOW_LOGGING_LEVEL says.
    # urllib3's lines on retries hold the URL with its query, and so a password.
    for library in ("mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(library).setLevel(logging.ERROR)
    return MlflowClient(uri)


def _metric(name: str, value: float, time_ms: int, step: int) -> Any:  # noqa: ANN401
    from mlflow.entities import Metric

    return Metric(name, float(value), time_ms, step)


def _same(stored: float, value: float) -> bool:
    """Tell whether a server's number is the journal's: databases may round its last digits."""
    if math.isinf(value):  # MLflow stores the largest number in its place
        return math.copysign(1, value) * stored > 1e308
    return math.isclose(stored, value, rel_tol=1e-12) or (stored != stored and value != value)


def _last_value(changes: str | None, param: str) -> str:
    """Return a param's value after the changes that its tag tells of."""
    return changes.rpartition("; ")[2].rpartition(" from step ")[0] if changes else param
