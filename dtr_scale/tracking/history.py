"""Read runs back from MLflow, as run directories: what a server has of config, journal and samples.

A run whose directory is on this machine is read there: the directory has all of it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dtr_scale.errors import ConfigError
from dtr_scale.tracking.attempt_runs import PARENT
from dtr_scale.tracking.findings import EVALUATIONS, PICTURES
from dtr_scale.tracking.mirror import reason_of
from dtr_scale.tracking.mlflow import Server
from dtr_scale.tracking.names import EVALUATED, LOSS, journal_key
from dtr_scale.tracking.run_file import read_run_file
from dtr_scale.tracking.uri import artifact_home, shown_uri

_JOURNAL, _CONFIG, _STATUS = "journal.jsonl", "config.json", "status.json"
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_OUTCOMES = {"RUNNING": "running", "FINISHED": "finished", "KILLED": "preempted"}
_LITERALS: dict[str, Any] = {"None": None, "True": True, "False": False}


class History:
    """The runs of an MLflow server or database. ConfigError where it does not answer."""

    def __init__(self, uri: str, run_dir: Path) -> None:
        """`run_dir` is any run directory beside the database, if it is the one beside the runs."""
        self._uri = uri
        with self._answering():
            self._server = Server(uri, artifact_home(uri, run_dir))

    def find(self, name: str) -> list[str]:
        """Return the ids of the runs of an experiment, oldest first, or that of the run `name`.

        Neither attempts nor runs that another one has superseded; [] where there is no such name.
        """
        with self._answering():
            if _RUN_ID.fullmatch(name) and self._server.run(name):
                return [name]
            experiment = self._server.find_experiment(name)
            runs = self._server.runs(experiment) if experiment else []
            return [run.info.run_id for run in runs if PARENT not in run.data.tags]

    def experiment_id(self, name: str) -> str | None:
        """Return the id of an experiment, None if there is none of the name."""
        with self._answering():
            return self._server.find_experiment(name)

    def directory(self, run_id: str) -> Path | None:
        """Return a run's directory on this machine, None if it is not here or another run's."""
        with self._answering():
            run = self._server.run(run_id)
        place = Path(run.data.tags.get("run_dir", "")) if run else Path()
        kept = read_run_file(place, self._uri) if place.is_absolute() else None
        return place if kept and kept["run_id"] == run_id else None

    def fetch(self, run_id: str, folder: Path) -> None:
        """Write what the server has of a run into an empty folder, as a run directory."""
        with self._answering():
            run = self._server.run(run_id)
            if run is None:
                raise ConfigError(f"MLflow at {shown_uri(self._uri)} has no run {run_id}")
            files = set(self._server.files(run_id))
            _write(folder / _CONFIG, self._config(run, files))
            outcome = _OUTCOMES.get(run.info.status, "failed")
            _write(folder / _STATUS, json.dumps({"outcome": outcome}))
            points = {name: self._server.history(run_id, name) for name in run.data.metrics}
            journal = self._server.read_file(run_id, _JOURNAL) if _JOURNAL in files else b""
            if not _reaches(journal, max((p.step for p in points.get(LOSS, [])), default=0)):
                journal = _lines(_records(points))
            _write(folder / _JOURNAL, journal)
            if EVALUATIONS in files:
                _write(folder / EVALUATIONS, self._server.read_file(run_id, EVALUATIONS))
            else:
                _write(folder / EVALUATIONS, _lines(_evaluations(run_id, points)))
            for step, file in self._server.image_files(run_id, PICTURES).items():
                picture = folder / PICTURES / f"step_{step:08d}.png"
                _write(picture, self._server.read_file(run_id, file))

    def _config(self, run: Any, files: set[str]) -> str | bytes:  # noqa: ANN401
        if _CONFIG in files:
            return self._server.read_file(run.info.run_id, _CONFIG)
        config: dict[str, Any] = {"name": run.info.run_name}
        for key, text in run.data.params.items():
            *sections, last = key.split(".")
            node = config
            for section in sections:
                node = node.setdefault(section, {})
            node[last] = _value(text)
        return json.dumps(config)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # of requests, SQLAlchemy, MLflow
            raise ConfigError(
                f"MLflow at {shown_uri(self._uri)}: {reason_of(error, self._uri)}; give "
                "--tracking-uri, or run directories"
            ) from None


def _records(points: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the journal's records that points tell of, by their steps."""
    records: dict[int, dict[str, float]] = {}
    for name, history in points.items():
        if key := journal_key(name):
            for point in history:
                records.setdefault(point.step, {"step": point.step})[key] = point.value
    return [records[step] for step in sorted(records)]


def _evaluations(run_id: str, points: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return numbers that are known without their manifests."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for name, history in points.items():
        if name.startswith(EVALUATED):
            for point in history:
                numbers = found.setdefault((point.step, point.time_ms), {})
                numbers[name.removeprefix(EVALUATED)] = point.value
    return [
        {
            "time": datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds"),
            "step": step,
            "metrics": numbers,
            "manifest": {"manifest unknown": run_id},
        }
        for (step, time_ms), numbers in sorted(found.items())
    ]


def _reaches(journal: bytes, step: int) -> bool:
    """Tell whether a journal that was sent at the end of an attempt has all steps by now."""
    lines = journal.splitlines()
    try:
        return bool(lines) and json.loads(lines[-1])["step"] >= step
    except (ValueError, KeyError):
        return False


def _value(text: str) -> Any:  # noqa: ANN401
    """Return the value that a param was: MLflow keeps Python's text of it."""
    if text in _LITERALS:
        return _LITERALS[text]
    try:
        # Python's text of lists of numbers and strings is JSON but for the quotes.
        return json.loads(text.replace("'", '"'))
    except ValueError:
        return text


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
