"""Bring a run's MLflow run up to what its directory holds.

MLflow never deletes a point and never changes a param. So a step is sent once, and a journal that
went back to an older checkpoint and took another way from there gets a new MLflow run. The old
one is renamed, tagged `superseded_by`, and put below the new one.
"""

import logging
from collections import deque
from typing import Any

from dtr_scale.tracking.artifacts import RunArtifacts
from dtr_scale.tracking.attempt_runs import ATTEMPT, PARENT, TRAINING, AttemptRuns
from dtr_scale.tracking.attempts import read_attempts
from dtr_scale.tracking.checkpoints import CheckpointModels
from dtr_scale.tracking.description import RunInfo
from dtr_scale.tracking.findings import Evaluation, read_evaluations
from dtr_scale.tracking.journal import Record, read_journal, read_new_records
from dtr_scale.tracking.mlflow import DataSet, Server
from dtr_scale.tracking.names import (
    EVALUATED,
    LOSS,
    SYSTEM,
    evaluation_name,
    metric_name,
    valid_names,
)
from dtr_scale.tracking.points import RunPoints, is_same
from dtr_scale.tracking.run_file import read_run_file, write_run_file
from dtr_scale.tracking.uri import runs_page

log = logging.getLogger(__name__)

_PARAM_CHARACTERS = 6000


class RunMirror:
    """A run on a server that answers. It asks what the server has, and sends the rest.

    After any error make a new one: the server may have taken what it did not confirm.
    """

    def __init__(self, info: RunInfo) -> None:
        self._info = info
        self._told = info.description
        self._server = Server(info.uri, info.home)
        self._experiment_id = self._server.experiment(self._told.experiment)
        kept = self._kept()
        self._run_id = kept["run_id"] if kept else self._create()
        self._begin(kept.get("continues") if kept else None)

    @property
    def run_id(self) -> str:
        return self._run_id

    @property
    def page(self) -> str:
        """Where the run is shown beside the others of its experiment."""
        return runs_page(self._info.uri, self._experiment_id, self._info.run_dir)

    def send_journal(self) -> int:
        """Send the records that the server does not have; return the last step that it has."""
        records, end = read_new_records(self._info.journal, self._sent_bytes)
        unsent = self._after_known(records)
        if unsent is None:
            self._begin_another_run()
            records, end = read_new_records(self._info.journal, 0)
            unsent = records
        self._server.log_metrics(
            self._run_id,
            (
                ({metric_name(k): v for k, v in record.items() if k != "step"}, int(record["step"]))
                for record in unsent
            ),
        )
        self._sent_bytes = end
        self._last_step = int(records[-1]["step"]) if records else self._last_step
        return self._last_step

    def send_figures(self) -> None:
        """Send attempts, checkpoints and evaluations."""
        attempts = read_attempts(self._info.run_dir)
        self._attempts.send(attempts)
        kept = self._info.checkpoints()
        self._models.send(kept)
        if kept:
            newest = {"checkpoint": kept[max(kept)]}
            if newest != self._newest:
                self._server.log_tags(self._run_id, newest)
                self._newest = newest
        for evaluation in read_evaluations(self._info.run_dir, attempts):
            self._send_evaluation(evaluation)

    def send_artifacts(self) -> None:
        """Send pictures and files. They go elsewhere than figures, and may fail by themselves."""
        attempts = read_attempts(self._info.run_dir)
        self._artifacts.send_pictures(attempts, self._last_step)
        self._artifacts.send_files(self._told.data)
        if attempts and attempts[-1].end:  # else it would be sent again and again
            self._artifacts.send_file(self._info.journal)

    def _begin(self, continues: dict[str, Any] | None) -> None:
        self._describe()
        history = self._server.history(self._run_id, LOSS)
        if continues and not history:  # no journal yet: this run was made a moment ago
            self._continue(**continues)
            history = self._server.history(self._run_id, LOSS)
        self._known = deque(history)
        self._sent_bytes = 0
        self._last_step = 0
        self._newest: dict[str, str] = {}
        server, training = self._server, self._told.training
        self._points = RunPoints(server, self._run_id)
        last_sign_ms = max((point.time_ms for point in history), default=None)
        self._attempts = AttemptRuns(
            server, self._experiment_id, self._run_id, training, self._points, last_sign_ms
        )
        self._models = CheckpointModels(
            server, self._experiment_id, self._run_id, self._told.name, {TRAINING: training}
        )
        self._artifacts = RunArtifacts(server, self._run_id, self._info.run_dir)

    def _after_known(self, records: list[Record]) -> list[Record] | None:
        """Return the records after those that the server has, None if it has others.

        A run that goes on from its checkpoint after a kill repeats its steps to the last bit, and
        its points are already there. The loss tells: it is of every record.
        """
        if records and not self._sent_bytes:
            # On another host the journal begins where the checkpoint ended.
            first, step = records[0]["step"], self._told.step
            while self._known and self._known[0].step < first and self._known[0].step <= step:
                self._known.popleft()
        for index, record in enumerate(records):
            if not self._known:
                return records[index:]
            known = self._known.popleft()
            if known.step != record["step"] or not is_same(known.value, record["loss"]):
                return None
        return []

    def _begin_another_run(self) -> None:
        continues = {"run_id": self._run_id, "step": self._told.step}
        log.info(
            "MLflow has other figures after step %d than the journal; a new run there takes its "
            "place, with all steps",
            self._told.step,
        )
        self._run_id = self._create(continues)
        self._begin(continues)
        # What was copied is not in the journal.
        self._known.clear()

    def _continue(self, run_id: str, step: int) -> None:
        """Mark the run that this one continues, and copy what is on no disk here up to `step`.

        A copied point has its old time: sent again, it is the same.
        """
        server, old = self._server, self._server.run(run_id)
        if old is None:
            return
        # A journal on a new host begins later than the run.
        first = next((int(r["step"]) for r in read_journal(self._info.journal)), step + 1)
        on_disk = {
            (evaluation_name(key, e.num_samples), e.step)
            for e in read_evaluations(self._info.run_dir, read_attempts(self._info.run_dir))
            for key in e.metrics
        }
        for name in old.data.metrics:
            last = step if name.startswith(EVALUATED) else min(step, first - 1)
            if name.startswith(SYSTEM) or last < 1:
                continue
            points = (
                (name, point)
                for point in server.history(run_id, name)
                if point.step <= last and (name, point.step) not in on_disk
            )
            server.log_points(self._run_id, points)
        for tag, text in old.data.tags.items():
            # The changes of this job, noted before its figures showed that it went another way.
            if tag.startswith("changed.") and text.endswith(f" from step {step}"):
                earlier = text.rpartition("; ")[0]
                if earlier:
                    server.log_tags(run_id, {tag: earlier})
                else:
                    server.delete_tag(run_id, tag)
        superseded = {"superseded_by": self._run_id, "superseded_at_step": str(step)}
        server.log_tags(run_id, superseded | {PARENT: self._run_id})
        server.rename(run_id, f"{self._told.name} (superseded at step {step})")
        for model in server.models(self._experiment_id, run_id):
            server.delete_model(model.model_id)
        if old.info.status == "RUNNING":
            server.terminate(run_id, "KILLED")

    def _describe(self) -> None:
        """Set the tags, and the params and expected figures that the run does not have.

        A param that has changed since is told by a tag: `changed.train.lr`.
        """
        run = self._server.run(self._run_id)
        assert run is not None, "it was found or made a moment ago"
        data, told = run.data, self._told
        params: dict[str, str] = {}
        tags = {**told.tags, TRAINING: told.training}
        for name, param in valid_names(told.params).items():
            # MLflow would cut it in silence, and it would look changed at every start.
            value = str(param)[:_PARAM_CHARACTERS]
            if name not in data.params:
                params[name] = value
                continue
            tag = f"changed.{name}"
            before = data.tags.get(tag)
            if value != _last_value(before, data.params[name]):
                now = f"{value} from step {told.step}"
                tags[tag] = f"{before}; {now}" if before else now
        self._server.log_params(self._run_id, params)
        self._server.log_tags(self._run_id, tags)
        expected = valid_names({f"expected/{key}": value for key, value in told.expected.items()})
        new = {name: value for name, value in expected.items() if name not in data.metrics}
        self._server.log_metrics(self._run_id, [(new, 0)])
        if told.dataset and not (run.inputs and run.inputs.dataset_inputs):
            self._server.log_dataset(self._run_id, DataSet(**told.dataset))

    def _send_evaluation(self, evaluation: Evaluation) -> None:
        named = {
            evaluation_name(k, evaluation.num_samples): v for k, v in evaluation.metrics.items()
        }
        dataset = DataSet(*evaluation.reference) if evaluation.reference else None
        model = self._models.at(evaluation.step)
        self._points.send(valid_names(named), evaluation.step, evaluation.time, model, dataset)

    def _kept(self) -> dict[str, Any] | None:
        """Return which run is this training's on this server, if there is one.

        By mlflow.json, or by the id that is kept with the checkpoints: on another host, or if the
        answer was lost when the run was made.
        """
        kept = read_run_file(self._info.run_dir, self._info.uri)
        if kept and self._server.run(kept["run_id"]):
            return kept
        if kept:
            log.warning("MLflow no longer has run %s; it gets a new one", kept["run_id"])
        run = find_run(self._server, self._experiment_id, self._told.training)
        if run is None:
            return None
        continues = None
        if before := run.data.tags.get("continues"):
            continues = {"run_id": before, "step": int(run.data.tags["continues_at_step"])}
        return self._keep(run.info.run_id, continues)

    def _create(self, continues: dict[str, Any] | None = None) -> str:
        tags = {TRAINING: self._told.training}
        if continues:
            tags["continues"] = continues["run_id"]
            tags["continues_at_step"] = str(continues["step"])
        run_id = self._server.create_run(self._experiment_id, self._told.name, tags)
        self._keep(run_id, continues)
        return run_id

    def _keep(self, run_id: str, continues: dict[str, Any] | None) -> dict[str, Any]:
        content = {"run_id": run_id, "experiment": self._told.experiment, "continues": continues}
        write_run_file(self._info.run_dir, self._info.uri, content)
        return content


def find_run(server: Server, experiment_id: str, training: str) -> Any:  # noqa: ANN401
    """Return the run of a training that counts, None if there is none."""
    for run in reversed(server.runs(experiment_id, (TRAINING, training))):
        if not run.data.tags.keys() & {ATTEMPT, "superseded_by"}:
            return run
    return None


def _last_value(changes: str | None, param: str) -> str:
    """Return a param's value after the changes that its tag tells of."""
    return changes.rpartition("; ")[2].rpartition(" from step ")[0] if changes else param
