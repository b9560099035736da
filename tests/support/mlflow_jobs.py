"""Jobs of a run as the tracker sees them, and what MLflow shows of a run directory."""

import contextlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime

from PIL import Image

from dtr_scale.tracking import mlflow
from dtr_scale.tracking.attempts import begin_attempt, close_open_attempt, end_attempt
from dtr_scale.tracking.description import Description, RunInfo
from dtr_scale.tracking.journal import Journal
from dtr_scale.tracking.mirror import MlflowTracker
from dtr_scale.tracking.uri import artifact_home, tracking_uri

PARAMS, TAGS = {"train.lr": 1e-4, "model.type": "dit"}, {"host": "here"}
LOSS, DISTANCE = "train/loss", "eval/fid_10k"


class Job:
    """One job of a run that goes on from a step: its journal, its attempt and its tracker."""

    def __init__(
        self,
        run_dir,
        uri,
        *,
        step=0,
        params=PARAMS,
        tags=TAGS,
        checkpoints: Callable[[], dict[int, str]] = dict,
        **described,
    ):
        run_dir.mkdir(exist_ok=True)
        self.run_dir = run_dir
        self.journal = Journal(run_dir / "journal.jsonl", step=step)
        close_open_attempt(run_dir, {}, time.time())
        self.attempt = begin_attempt(run_dir, step=step, hosts=["a", "b"], world_size=2)
        told = Description(**{
            "training": str(run_dir), "experiment": "tests", "name": "a_run", "step": step,
            "params": params, "tags": tags, **described,
        })  # fmt: skip
        uri = tracking_uri(uri, run_dir)
        home = artifact_home(uri, run_dir)
        self.info = RunInfo(run_dir, self.journal.path, uri, home, told, checkpoints)
        self.tracker = MlflowTracker(self.info)
        self.step = step

    def log(self, steps, *, scale=1):
        for step in steps:
            record = {"step": step, "loss": scale / step, "lr": 0.1}
            self.journal.write(record)
            self.tracker.log(record)
            self.step = step

    def evaluate(self, step, **metrics):
        """Leave an evaluation and a picture of a step, as jobs and commands do."""
        reference = {"inception": {"source": "data/digits", "sha256": "f" * 64}}
        manifest = {"step": step, "num_samples": 10_000, "reference": reference}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with (self.run_dir / "evaluations.jsonl").open("a") as file:
            line = {"time": now, "metrics": metrics, "manifest": manifest}
            file.write(json.dumps(line) + "\n")
        (self.run_dir / "samples").mkdir(exist_ok=True)
        Image.new("L", (16, 16), step).save(self.run_dir / f"samples/step_{step:08d}.png")
        self.tracker.look()

    def finish(self, outcome="finished", goodput=None):
        self.journal.close()
        told = {"outcome": outcome, "step": self.step, "reason": "asked", "goodput": goodput}
        end_attempt(self.run_dir, self.attempt, **told)
        self.tracker.finish()


def run_of(run_dir, uri):
    """Return (client, run) of what a run directory says is its MLflow run."""
    from mlflow import MlflowClient

    kept = json.loads((run_dir / "mlflow.json").read_text(encoding="utf-8"))
    client = MlflowClient(uri)
    return client, client.get_run(kept["run_id"])


def points_of(run_dir, uri, key=LOSS):
    client, run = run_of(run_dir, uri)
    return [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, key)]


def images_of(info, uri=None):
    """Return (chart, step) of a run's pictures, as often as each is there."""
    uri = uri or info.uri
    _, run = run_of(info.run_dir, uri)
    images = mlflow.Server(uri, info.home).images(run.info.run_id)
    return sorted((key, step) for key, step, _ in images)


def models_of(run_dir, uri):
    """Return the models of a run directory's MLflow run, by their steps."""
    _, run = run_of(run_dir, uri)
    found = mlflow.Server(uri, None).models(run.info.experiment_id, run.info.run_id)
    return sorted(found, key=lambda model: int(model.tags["dtr_scale.step"]))


def children_of(run_dir, uri):
    """Return the runs below a run directory's MLflow run, oldest first."""
    client, run = run_of(run_dir, uri)
    below = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    return client.search_runs(
        [run.info.experiment_id], below, order_by=["attributes.start_time ASC"]
    )


def assert_steps(run_dir, uri, steps):
    """Each step stands there once, with its numbers."""
    assert sorted(points_of(run_dir, uri)) == [(step, 1 / step) for step in steps]
    assert sorted(points_of(run_dir, uri, "train/lr")) == [(step, 0.1) for step in steps]


def last_step(run_dir, uri):
    with contextlib.suppress(FileNotFoundError):
        return max((step for step, _ in points_of(run_dir, uri)), default=0)
    return 0
