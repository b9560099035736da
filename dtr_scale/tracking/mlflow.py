"""Talk to an MLflow server, or to the database of one. The only module that imports mlflow.

Importing it takes seconds, so others do that in their thread.
"""

import fcntl
import logging
import os
import posixpath
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

# Before mlflow is imported. A dead server would hold each call for minutes, the usage report calls
# out, and the link to a run that has ended is printed with the password of its server.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    FileInfo,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.db.utils import _initialize_tables
from mlflow.store.entities import PagedList
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from PIL import Image

from dtr_scale.tracking.names import valid_names

log = logging.getLogger(__name__)

_Found = TypeVar("_Found")

_METRICS_PER_CALL, _ENTRIES_PER_CALL = 1000, 100  # MLflow's own limits
_PARAM_CHARACTERS, _TAG_CHARACTERS, _DIGEST_CHARACTERS = 6000, 8000, 36
_EXPERIMENT_CHARACTERS = 500
_PROXIED = "mlflow-artifacts:"
# How `log_image` names its files, which no interface tells: key, step, time, a random part.
_IMAGE = re.compile(r"(.+)\+step\+(\d+)\+timestamp\+(\d+)\+[^+]+\.png")

# MLflow tells of every table it makes and of every retry, whatever MLFLOW_LOGGING_LEVEL says.
# urllib3's lines on retries hold the URL with its query, and so a password.
for library in ("mlflow.store.db.utils", "urllib3.connectionpool", "mlflow.system_metrics"):
    logging.getLogger(library).setLevel(logging.ERROR)


@dataclass(frozen=True)
class DataSet:
    """What a run was trained on, or a number was measured against."""

    name: str
    digest: str
    source: str = ""
    summary: str = ""
    """JSON, shown with the data set."""

    def names(self) -> dict[str, str]:
        return {"dataset_name": self.name[:500], "dataset_digest": self.digest[:_DIGEST_CHARACTERS]}


@dataclass(frozen=True)
class Point:
    """One value of a metric."""

    step: int
    value: float
    time_ms: int


class Server:
    """An MLflow server or database that answers; what it raises is an outage, or a refusal.

    `home` is where a database's artifacts lie, None for a server, which takes them.
    """

    def __init__(self, uri: str, home: Path | None) -> None:
        if uri.startswith("sqlite:///"):
            _make_database(Path(uri.removeprefix("sqlite:///").partition("?")[0]))
        self._client = _Client(uri, home)
        self._has_home = home is not None

    def experiment(self, name: str) -> str:
        """Return the id of the experiment of a name, which is made where there is none."""
        name = name.strip()[:_EXPERIMENT_CHARACTERS] or "dtr-scale"
        found = self._client.get_experiment_by_name(name)
        if found is None:
            # A path on this disk would be fixed for good, and the folder could not be moved.
            folder = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:80]
            place = f"{_PROXIED}/{folder}" if self._has_home else None
            try:
                return self._client.create_experiment(name, artifact_location=place)
            except MlflowException as error:  # another run was first
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return self.experiment(name)
        if found.lifecycle_stage != "active":
            log.warning("MLflow's experiment %r was deleted; it is restored for this run", name)
            self._client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def run(self, run_id: str) -> Run | None:
        """Return a run, None if it was deleted or never was."""
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def runs(self, experiment_id: str, tag: tuple[str, str] | None = None) -> list[Run]:
        """Return the runs of an experiment, or those of them that have a tag, oldest first."""
        having = f"tags.`{tag[0]}` = '{tag[1]}'" if tag else ""
        order = ["attributes.start_time ASC"]
        return _all_pages(
            lambda token: self._client.search_runs(
                [experiment_id], having, order_by=order, page_token=token
            )
        )

    def find_experiment(self, name: str) -> str | None:
        """Return the id of an experiment, None if there is none of the name."""
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found and found.lifecycle_stage == "active" else None

    def create_run(
        self,
        experiment_id: str,
        name: str,
        tags: Mapping[str, str],
        start_ms: int | None = None,
    ) -> str:
        tags = {key: value[:_TAG_CHARACTERS] for key, value in valid_names(tags).items()}
        run = self._client.create_run(experiment_id, start_ms, tags, name)
        return run.info.run_id

    def rename(self, run_id: str, name: str) -> None:
        self._client.update_run(run_id, name=name)

    def set_running(self, run_id: str) -> None:
        self._client.update_run(run_id, status="RUNNING")

    def terminate(self, run_id: str, status: str, end_ms: int | None = None) -> None:
        self._client.set_terminated(run_id, status, end_ms)

    def delete_tag(self, run_id: str, tag: str) -> None:
        self._client.delete_tag(run_id, tag)

    def log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        named = valid_names(tags)
        self._log(run_id, "tags", [RunTag(k, str(v)[:_TAG_CHARACTERS]) for k, v in named.items()])

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        self._log(run_id, "params", [Param(k, v) for k, v in params.items()])

    def log_metrics(self, run_id: str, points: Iterable[tuple[Mapping[str, float], int]]) -> None:
        """Send the figures of steps, in calls as large as the server takes.

        All figures of a step go in one call: whoever finds one of them finds all.
        """
        batch: list[Metric] = []
        now = int(time.time() * 1000)
        for figures, step in points:
            named = valid_names(figures)
            if len(batch) + len(named) > _METRICS_PER_CALL:
                self._log(run_id, "metrics", batch)
                batch = []
            batch += [Metric(name, float(value), now, step) for name, value in named.items()]
        self._log(run_id, "metrics", batch)

    def log_points(
        self,
        run_id: str,
        points: Iterable[tuple[str, Point]],
        *,
        model_id: str | None = None,
        dataset: DataSet | None = None,
    ) -> None:
        """Send single points with their times, of a model and a data set."""
        about: dict[str, Any] = {"model_id": model_id, "run_id": run_id if model_id else None}
        about |= dataset.names() if dataset else {}
        metrics = [Metric(name, p.value, p.time_ms, p.step, **about) for name, p in points]
        self._log(run_id, "metrics", metrics)

    def history(self, run_id: str, name: str) -> list[Point]:
        """Return all points of a metric, by their steps."""
        points = self._client.get_metric_history(run_id, name)
        return sorted(
            (Point(p.step, p.value, p.timestamp) for p in points), key=lambda p: (p.step, p.time_ms)
        )

    def log_dataset(self, run_id: str, dataset: DataSet) -> None:
        """Tell what a run is trained on; it is the same data set in every run of its digest."""
        told = Dataset(
            dataset.name[:500],
            dataset.digest[:_DIGEST_CHARACTERS],
            source_type="local" if "://" not in dataset.source else dataset.source.split(":")[0],
            source=dataset.source,
            profile=dataset.summary,
        )
        context = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(run_id, [DatasetInput(told, [context])])

    def log_image(self, run_id: str, path: Path, key: str, step: int, time_ms: int) -> None:
        """Send a picture into the chart `key`, which has a slider over steps."""
        # Left to itself, Pillow would start Ghostscript on PostScript of that name.
        with Image.open(path, formats=["PNG"]) as image:
            self._client.log_image(run_id, image, key=key, step=step, timestamp=time_ms)

    def images(self, run_id: str) -> set[tuple[str, int, int]]:
        """Return (key, step, time in ms) of every picture that a run has."""
        names = (posixpath.basename(f.path) for f in self._client.list_artifacts(run_id, "images"))
        found = filter(None, map(_IMAGE.fullmatch, names))
        # `log_image` writes a "/" of the key as "~".
        return {(m[1].replace("~", "/"), int(m[2]), int(m[3])) for m in found}

    def image_files(self, run_id: str, key: str) -> dict[int, str]:
        """Return the newest picture of each step of the chart `key`, as an artifact's path."""
        newest: dict[int, tuple[int, str]] = {}
        for file in self._client.list_artifacts(run_id, "images"):
            match = _IMAGE.fullmatch(posixpath.basename(file.path))
            if match and match[1] == key:
                found = (int(match[3]), file.path)
                newest[int(match[2])] = max(newest.get(int(match[2]), found), found)
        return {step: path for step, (_, path) in newest.items()}

    def files(self, run_id: str) -> list[str]:
        """Return the names of a run's artifacts, folders left out."""
        return [f.path for f in self._client.list_artifacts(run_id) if not f.is_dir]

    def read_file(self, run_id: str, path: str) -> bytes:
        """Return an artifact's content."""
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(run_id, path, folder)).read_bytes()

    def log_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Send a file; one of its name is replaced."""
        self._client.log_artifact(run_id, str(path), folder)

    def log_text(self, run_id: str, name: str, text: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_text(text, encoding="utf-8")
            self._client.log_artifact(run_id, str(path))

    def models(self, experiment_id: str, run_id: str) -> list[LoggedModel]:
        """Return the models of a run."""
        return _all_pages(
            lambda token: self._client.search_logged_models(
                [experiment_id], f"source_run_id = '{run_id}'", page_token=token
            )
        )

    def create_model(
        self, experiment_id: str, run_id: str, name: str, *, step: int, tags: Mapping[str, str]
    ) -> str:
        """Make a model whose files are elsewhere, and that a run has made at a step."""
        # As `mlflow.create_external_model` does, which knows one server per process, and stores a
        # file that says nothing.
        model = self._client.create_logged_model(
            experiment_id,
            name=re.sub(r"[/:.%\"']", "_", name),
            source_run_id=run_id,
            tags={"mlflow.model.isExternal": "true", **tags},
            model_type="denoiser",
        )
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        return model.model_id

    def tag_model(self, model_id: str, tags: Mapping[str, str]) -> None:
        self._client.set_logged_model_tags(model_id, dict(tags))

    def delete_model(self, model_id: str) -> None:
        self._client.delete_logged_model(model_id)

    def _log(self, run_id: str, kind: str, entries: Sequence[Any]) -> None:
        """Send metrics, params or tags; what the server refuses costs no other its place."""
        most = _METRICS_PER_CALL if kind == "metrics" else _ENTRIES_PER_CALL
        for start in range(0, len(entries), most):
            part = entries[start : start + most]
            try:
                sent: dict[str, Any] = {kind: part}
                self._client.log_batch(run_id, **sent)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                if len(part) == 1:
                    log.warning("MLflow takes no %s %r", kind.rstrip("s"), part[0].key)
                    continue
                # One by one: a call fails as a whole, and the others are valid.
                for entry in part:
                    self._log(run_id, kind, [entry])


class _Client(MlflowClient):
    """MLflow's client, which also reaches the artifacts of a database that no server is before.

    Their address, `mlflow-artifacts:/...`, holds no path: a server that is started beside the
    database finds them wherever the folder is. MLflow's own client wants that server.
    """

    def __init__(self, uri: str, home: Path | None) -> None:
        super().__init__(uri)
        self._home = home
        self._folders: dict[str, Path | None] = {}

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        if folder := self._folder(run_id):
            LocalArtifactRepository(str(folder)).log_artifact(local_path, artifact_path)
        else:
            super().log_artifact(run_id, local_path, artifact_path)

    def list_artifacts(self, run_id: str, path: str | None = None) -> list[FileInfo]:
        if folder := self._folder(run_id):
            return LocalArtifactRepository(str(folder)).list_artifacts(path)
        return super().list_artifacts(run_id, path)

    def download_artifacts(self, run_id: str, path: str, dst_path: str | None = None) -> str:
        if folder := self._folder(run_id):
            return LocalArtifactRepository(str(folder)).download_artifacts(path, dst_path)
        return super().download_artifacts(run_id, path, dst_path)

    def _folder(self, run_id: str) -> Path | None:
        if self._home is None:
            return None
        if run_id not in self._folders:
            uri = self.get_run(run_id).info.artifact_uri or ""
            place = uri.removeprefix(_PROXIED).strip("/")
            self._folders[run_id] = self._home / place if uri.startswith(_PROXIED) else None
        return self._folders[run_id]


def _all_pages(search: Callable[[str | None], PagedList[_Found]]) -> list[_Found]:
    """Return all that a search finds, of which it gives a page for each token."""
    found, token = [], None
    while True:
        page = search(token)
        found += page
        if not (token := page.token):
            return found


def _make_database(path: Path) -> None:
    """Make MLflow's tables in a new sqlite file, whole or not at all.

    It takes seconds. Of a process that ends meanwhile MLflow would leave some of the tables, and
    refuse them ever after.
    """

    def is_made() -> bool:
        return path.exists() and path.stat().st_size > 0  # opened alone, it is an empty file

    if is_made():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with new.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several runs may begin at once
        if is_made():
            return
        new.unlink(missing_ok=True)
        engine = sqlalchemy.create_engine(f"sqlite:///{new}")
        # What MLflow's own store does with an empty database; no public function does it alone.
        _initialize_tables(engine)
        engine.dispose()
        new.replace(path)


def open_client(uri: str) -> None:
    """Raise what MLflow says of an address that it cannot use."""
    MlflowClient(uri)


def system_monitor(uri: str, run_id: str, node: str) -> SystemMetricsMonitor:
    """Return what samples this node's CPU, memory, disk, network and, with NVML, GPUs."""
    return SystemMetricsMonitor(run_id, resume_logging=True, node_id=node, tracking_uri=uri)
