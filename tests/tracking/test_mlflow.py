"""MLflow shows what the journal holds, each step once, and training never waits for it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image

from dtr_scale.config.load import load_experiment
from dtr_scale.jobs import description
from dtr_scale.tracking import mirror, mlflow
from dtr_scale.tracking import run as run_module
from dtr_scale.tracking.attempts import begin_attempt, close_open_attempt, end_attempt
from dtr_scale.tracking.description import Description, RunInfo
from dtr_scale.tracking.journal import Journal
from dtr_scale.tracking.mirror import MlflowTracker, send_all
from dtr_scale.tracking.uri import artifact_home, tracking_uri

# mlflow 3.17 declares its tables with a loader strategy that SQLAlchemy 2.1 retires.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
DEMO = Path(__file__).parents[2] / "configs" / "demo_digits.json"
PARAMS, TAGS = {"train.lr": 1e-4, "model.type": "dit"}, {"host": "here"}
LOSS, DISTANCE = "train/loss", "eval/fid_10k"


class MlflowServer:
    """`mlflow server` over a sqlite file; it can be killed and started again."""

    def __init__(self, directory):
        self._directory = directory
        binary = shutil.which("mlflow", path=sysconfig.get_path("scripts"))
        assert binary, "the MLflow server is missing; fix: pip install dtr-scale"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = free.getsockname()
        host, port = self.address
        self.uri = f"http://{host}:{port}"
        self._command = [
            binary, "server", "--host", host, "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{directory}/server.db",
            "--artifacts-destination", str(directory / "artifacts"),
        ]  # fmt: skip
        self.start()

    def start(self):
        with (self._directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._directory,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
                stdout=log,
                stderr=log,
            )
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health").close()
                return
            time.sleep(0.1)
        raise AssertionError((self._directory / "server.log").read_text())

    def kill(self):
        os.killpg(self._process.pid, signal.SIGKILL)  # it has a worker process
        self._process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """What the tracker sets stays in the test; a call to a dead server fails at once."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "WARNING")
    monkeypatch.setattr(mirror, "_SECONDS_BETWEEN_SENDS", 0.0)
    monkeypatch.setattr(mirror, "_FINISH_SECONDS", 60.0)


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

    def finish(self, outcome="finished"):
        self.journal.close()
        end_attempt(self.run_dir, self.attempt, outcome=outcome, step=self.step, reason="asked")
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


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def last_step(run_dir, uri):
    with contextlib.suppress(FileNotFoundError):
        return max((step for step, _ in points_of(run_dir, uri)), default=0)
    return 0


def test_the_server_is_the_configured_one_then_the_environments(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    for run in ("a", "a/expert_3", "a/replaced_20260101T000000"):
        assert tracking_uri(None, runs / run) == f"sqlite:///{runs}/mlflow.db"
    assert artifact_home("postgresql://host/db", runs / "a") == runs / "mlartifacts"
    assert artifact_home("http://host", runs / "a") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri(None, tmp_path) == "http://environment"
    assert tracking_uri("http://configured", tmp_path) == "http://configured"


def test_without_a_server_a_database_beside_the_runs_has_it_all(tmp_path):
    """Two runs share it, and the folder can be moved: a server started there shows everything."""
    overrides = ['--data.storage_options={"key": "KEY0", "secret": "SECRET0", "region": "here"}']
    experiment = load_experiment(DEMO, overrides)
    params = description.params(experiment, samples=1500, ranks=2, cost=None)
    runs = tmp_path / "runs"
    runs.mkdir()
    jobs = [Job(runs / name, None, params=params) for name in ("first", "second")]
    for job in jobs:
        job.log(range(1, 1200))  # more points than one call takes
        job.evaluate(2, fid=1.5)
        job.finish()
    uri = tracking_uri(None, runs / "first")
    for job in jobs:
        assert_steps(job.run_dir, uri, range(1, 1200))
        assert points_of(job.run_dir, uri, DISTANCE) == [(2, 1.5)]
        assert images_of(job.info) == [("samples", 2)]
    client, run = run_of(runs / "first", uri)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a_run")
    assert len(client.search_runs([run.info.experiment_id])) == 4, "two runs of one attempt each"
    told = run.data.params
    assert (told["train.lr"], told["data.storage_options.region"]) == ("0.001", "here")
    assert (told["train.epochs"], told["engine.ranks"]) == ("85.333", "2")
    assert not told.keys() & {"model.variant", "engine.shard", "run_dir", "objective.k"}
    for path in tmp_path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert b"KEY0" not in content and b"SECRET0" not in content, path

    moved = tmp_path / "elsewhere" / "runs"
    shutil.copytree(runs, moved)
    shutil.rmtree(runs)
    job = Job(moved / "first", None, step=1199)
    job.log([1200])
    job.finish()
    assert_steps(job.run_dir, job.info.uri, range(1, 1201))
    assert images_of(job.info) == [("samples", 2)]
    assert str(runs) not in str(run_of(job.run_dir, job.info.uri)[1].info.artifact_uri)


def test_every_job_of_a_run_directory_goes_on_with_one_run(server, tmp_path):
    run_ids = set()
    jobs = [("preempted", "KILLED"), ("failed", "FAILED"), ("finished", "FINISHED")]
    for number, (outcome, status) in enumerate(jobs):
        # Params never change in MLflow, even where a later job has others; tags do.
        params, tags = PARAMS | {"added": number, "train.lr": number + 1e-4}, {"host": outcome}
        # Each job stands 5 steps before the end of the last one, whose steps are on the server.
        step = max(0, 10 * number - 5)
        job = Job(tmp_path, server.uri, step=step, params=params, tags=tags)
        wait_until((tmp_path / "mlflow.json").exists)
        wait_until(lambda: run_of(tmp_path, server.uri)[1].info.status == "RUNNING")
        job.log(range(step + 1, 10 * number + 11))
        job.finish(outcome)
        _, run = run_of(tmp_path, server.uri)
        assert run.info.status == status
        assert (run.data.tags["host"], run.data.params["added"]) == (outcome, "0")
        assert run.data.params["train.lr"] == "0.0001"
        run_ids.add(run.info.run_id)
    assert len(run_ids) == 1
    _, run = run_of(tmp_path, server.uri)
    assert run.data.tags["changed.train.lr"] == "1.0001 from step 5; 2.0001 from step 15"
    assert run.data.tags["changed.added"] == "1 from step 5; 2 from step 15"
    assert "changed.model.type" not in run.data.tags
    assert_steps(tmp_path, server.uri, range(1, 31))

    killed = Job(tmp_path, server.uri, step=30)  # kill -9: nothing is written any more
    wait_until(lambda: len(children_of(tmp_path, server.uri)) == 4)
    killed.tracker._leaving.set()  # its thread would outlive the test
    killed.journal.close()
    Job(tmp_path, server.uri, step=30).finish()
    attempts = children_of(tmp_path, server.uri)
    assert [a.info.status for a in attempts] == [
        "KILLED", "FAILED", "FINISHED", "KILLED", "FINISHED"
    ]  # fmt: skip
    assert [a.info.run_name for a in attempts] == [f"attempt {n}" for n in range(1, 6)]
    assert [a.data.tags["from_step"] for a in attempts] == ["0", "5", "15", "30", "30"]
    assert [a.data.tags["to_step"] for a in attempts][:3] == ["10", "20", "30"]
    assert attempts[0].data.tags["hosts"] == "a, b"
    assert attempts[0].data.tags["reason"] == "asked"
    assert attempts[3].data.tags["reason"] == "it ended without a word"
    assert all((a.info.end_time or 0) >= a.info.start_time for a in attempts)


def test_another_host_finds_the_run_by_what_is_kept_with_the_checkpoints(server, tmp_path):
    """Its journal begins where the checkpoint ended; after a fall back the rest is copied."""
    here, there = tmp_path / "here", tmp_path / "there"
    job = Job(here, server.uri, training="one")
    job.log(range(1, 21))
    job.evaluate(10, fid=5.0)
    job.finish("failed")
    first = run_of(here, server.uri)[1]
    job = Job(there, server.uri, training="one", step=10)
    job.log(range(11, 26))  # to 20 as before
    job.finish("failed")
    assert run_of(there, server.uri)[1].info.run_id == first.info.run_id
    assert_steps(there, server.uri, range(1, 26))
    assert [a.info.run_name for a in children_of(there, server.uri)] == ["attempt 1", "attempt 2"]

    elsewhere = tmp_path / "elsewhere"
    job = Job(elsewhere, server.uri, training="one", step=15)
    job.log(range(16, 18), scale=3)
    job.finish()
    _, new = run_of(elsewhere, server.uri)
    assert new.data.tags["continues"] == first.info.run_id
    expected = [(step, (3 if step > 15 else 1) / step) for step in range(1, 18)]
    assert sorted(points_of(elsewhere, server.uri)) == expected
    assert points_of(elsewhere, server.uri, DISTANCE) == [(10, 5.0)]
    below = [str(run.info.run_name) for run in children_of(elsewhere, server.uri)]
    assert sorted(below) == [
        "a_run (superseded at step 15)", "attempt 1", "attempt 2", "attempt 3"
    ]  # fmt: skip


def test_another_server_gets_a_run_of_its_own_with_all_steps(server, tmp_path):
    job = Job(tmp_path, None)
    job.log(range(1, 6))
    job.finish("preempted")
    first = json.loads((tmp_path / "mlflow.json").read_text())
    job = Job(tmp_path, server.uri, step=5)
    job.log([6])
    job.finish()
    second = json.loads((tmp_path / "mlflow.json").read_text())
    assert first["run_id"] != second["run_id"]
    assert_steps(tmp_path, server.uri, range(1, 7))


def test_a_journal_that_took_another_way_gets_a_run_of_its_own(server, tmp_path):
    """After a fall back each step stands once in the new run; the old one tells what it was."""
    run_dir = tmp_path / "run"
    job = Job(run_dir, server.uri, checkpoints=lambda: {10: "c/10", 30: "c/30"})
    job.log(range(1, 31))
    job.evaluate(10, fid=5.0)
    job.evaluate(30, fid=4.0)
    job.finish("failed")
    client, old = run_of(run_dir, server.uri)
    assert [m.tags["checkpoint"] for m in models_of(run_dir, server.uri)] == ["c/10", "c/30"]

    time.sleep(1)  # evaluations tell whole seconds
    changed = PARAMS | {"train.lr": 5e-4}
    kept = {10: "c/10", 25: "c/25"}
    job = Job(run_dir, server.uri, step=20, params=changed, checkpoints=lambda: kept)
    job.log(range(21, 23))  # as before: the points are there
    job.log(range(23, 26), scale=3)
    job.evaluate(25, fid=3.0)
    job.finish("preempted")
    _, new = run_of(run_dir, server.uri)
    assert images_of(job.info) == [("samples", 10), ("samples", 25)]
    models = models_of(run_dir, server.uri)
    assert [m.tags["checkpoint"] for m in models] == ["c/10", "c/25"]
    found = [x for m in models for x in m.metrics or []]
    assert [(x.key, x.step, x.value) for x in found] == [(DISTANCE, 10, 5.0), (DISTANCE, 25, 3.0)]
    assert {(x.dataset_name, x.dataset_digest) for x in found} == {("digits", "f" * 36)}
    assert new.info.run_id != old.info.run_id
    steps = [(step, (3 if step > 22 else 1) / step) for step in range(1, 26)]
    assert sorted(points_of(run_dir, server.uri)) == steps
    assert points_of(run_dir, server.uri, DISTANCE) == [(10, 5.0), (25, 3.0)]
    assert (new.info.run_name, new.info.status) == ("a_run", "KILLED")
    assert new.data.params["train.lr"] == "0.0005"
    assert new.data.tags["continues"] == old.info.run_id
    assert new.data.tags["continues_at_step"] == "20"

    old = client.get_run(old.info.run_id)
    assert old.info.run_name == "a_run (superseded at step 20)"
    assert old.data.tags["superseded_by"] == new.info.run_id
    assert old.data.params["train.lr"] == "0.0001"
    assert "changed.train.lr" not in old.data.tags  # it never had another
    assert old.info.status != "RUNNING"
    job = Job(run_dir, server.uri, step=25)
    job.log([26])
    job.finish()
    assert run_of(run_dir, server.uri)[1].info.run_id == new.info.run_id
    assert sorted(points_of(run_dir, server.uri)) == [*steps, (26, 1 / 26)]


def test_a_job_that_repeats_fewer_steps_waits_for_the_next_to_differ(tmp_path):
    """A journal at other intervals is another one, too: its steps would stand between the old."""
    uri = tracking_uri(None, tmp_path)
    job = Job(tmp_path, None)
    job.log(range(2, 31, 2))
    job.finish("failed")
    first = run_of(tmp_path, uri)[1].info.run_id
    job = Job(tmp_path, None, step=20)
    job.log([22, 24])
    job.finish("preempted")
    assert run_of(tmp_path, uri)[1].info.run_id == first
    job = Job(tmp_path, None, step=24)
    job.log([27, 30])
    job.finish()
    assert run_of(tmp_path, uri)[1].info.run_id != first
    assert_steps(tmp_path, uri, [*range(2, 25, 2), 27, 30])


def test_an_odd_key_costs_nothing_but_its_characters(server, tmp_path, warnings_of):
    odd = {"expected.FID@50k": 2.06, "expected.FID 50k": 3, "expected.FID_50k": 4, "a//b": 5}
    run_dir = tmp_path / "run"
    told = {"experiment": "odd / name" * 100, "expected": {"FID@50k": 2.06}}
    tags = TAGS | {"~user": "me", "mlflow.note.content": "x" * 9000}
    job = Job(run_dir, server.uri, params=PARAMS | odd, tags=tags, **told)
    job.log(range(1, 4))
    job.evaluate(3, **{"FID@50k": 2.0, "legibility": 0.5})
    job.finish()
    _, run = run_of(run_dir, server.uri)
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "train.lr": "0.0001", "model.type": "dit", "expected.FID_50k": "2.06",
        "expected.FID 50k": "3", "expected.FID_50k_2": "4", "a__b": "5",
    }  # fmt: skip
    assert (run.data.tags["_user"], run.data.metrics["eval/FID_50k"]) == ("me", 2.0)
    assert run.data.metrics["eval/legibility_10k"] == 0.5
    assert run.data.metrics["expected/FID_50k"] == 2.06


def test_what_a_server_refuses_by_rules_of_its_own_costs_nothing_else(
    server, tmp_path, monkeypatch, warnings_of
):
    for module in (mlflow, run_module):
        monkeypatch.setattr(module, "valid_names", lambda entries: entries)
    job = Job(tmp_path, server.uri, params=PARAMS | {"FID@5k": 1, "last": 2})
    job.log([1])
    job.finish()
    _, run = run_of(tmp_path, server.uri)
    assert (run.info.status, run.data.params["last"]) == ("FINISHED", "2")
    assert_steps(tmp_path, server.uri, [1])
    assert warnings_of("dtr_scale.tracking.mlflow") == ["MLflow takes no param 'FID@5k'"]


def test_an_experiment_that_was_deleted_is_restored(server, tmp_path, warnings_of):
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    client.delete_experiment(client.create_experiment("gone"))
    job = Job(tmp_path, server.uri, experiment="gone")
    job.log([1])
    job.finish()
    assert_steps(tmp_path, server.uri, [1])
    assert "is restored" in warnings_of("dtr_scale.tracking.mlflow")[0]


def test_a_run_that_the_server_or_its_file_no_longer_has_is_made_anew(tmp_path):
    uri = tracking_uri(None, tmp_path)
    job = Job(tmp_path, None)
    job.log(range(1, 4))
    job.finish("preempted")
    client, run = run_of(tmp_path, uri)
    client.delete_run(run.info.run_id)
    for step in (3, 4):
        job = Job(tmp_path, None, step=step)
        job.log([step + 1])
        job.finish("preempted")
        assert_steps(tmp_path, uri, range(1, step + 2))
        (tmp_path / "mlflow.json").write_text("[]")


_SHORT_JOB = """
import pathlib, sys
from dtr_scale.logs import setup_logging
from dtr_scale.tracking import mirror
from dtr_scale.tracking.attempts import begin_attempt, close_open_attempt, end_attempt
from dtr_scale.tracking.description import Description, RunInfo
from dtr_scale.tracking.journal import Journal

mirror._FINISH_SECONDS = float(sys.argv[3])
setup_logging(0)
run_dir, uri = pathlib.Path(sys.argv[1]), sys.argv[2]
journal = Journal(run_dir / "journal.jsonl", step=20)
attempt = begin_attempt(run_dir, step=20)
told = Description(training=run_dir.name, experiment="tests", name="a_run", step=20)
tracker = mirror.MlflowTracker(RunInfo(run_dir, journal.path, uri, None, told))
for step in range(21, 41):
    journal.write({"step": step, "loss": 1 / step, "lr": 0.1})
    tracker.log({"step": step})
end_attempt(run_dir, attempt, outcome="finished", step=40)
tracker.finish()
"""
_SECRETS = ("hunter2", "hunter3")


@pytest.mark.parametrize("is_away", [False, True])
def test_no_password_is_shown_or_stored(server, tmp_path, is_away):
    """Neither ours nor in what MLflow, requests and urllib3 have to say."""
    port = 9 if is_away else server.address[1]
    uri = f"http://user:hunter2@127.0.0.1:{port}" + ("?password=hunter3" if is_away else "")
    env = os.environ | {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
        "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    }
    env.pop("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT")
    patience = "10" if is_away else "60"
    command = [sys.executable, "-c", _SHORT_JOB, tmp_path, uri, patience]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert ("next start" in ended.stderr) == is_away
    assert ("Connection refused" in ended.stderr) == is_away
    kept = [path.read_text() for path in tmp_path.iterdir()]
    if not is_away:
        _, run = run_of(tmp_path, server.uri)
        kept.append(str(run))
        assert f"http://127.0.0.1:{port}" in (tmp_path / "mlflow.json").read_text()
    for text in (ended.stdout, ended.stderr, *kept):
        assert not any(secret in text for secret in _SECRETS), text


def test_a_warning_leaves_the_password_out_of_what_an_error_says(
    tmp_path, monkeypatch, warnings_of
):
    uri = "http://user:hunter2@127.0.0.1:9?password=hunter3"

    def fail(info):
        raise ValueError(f"no answer from {info.uri}")

    monkeypatch.setattr(mirror, "_open", fail)
    monkeypatch.setattr(mirror, "_FINISH_SECONDS", 0.5)
    Job(tmp_path, uri).finish()
    told = warnings_of("dtr_scale.tracking.mirror")
    assert "no answer from http://127.0.0.1:9" in told[0]
    assert not any(secret in line for secret in _SECRETS for line in told)


def test_lost_replies_neither_repeat_nor_lose_anything(server, tmp_path, monkeypatch, warnings_of):
    monkeypatch.setattr(mirror, "_FIRST_RETRY_SECONDS", 0.01)
    with _losing_replies(server.address, lost=[1, 3, 5, 8, 10, 13]) as uri:
        run_dir = tmp_path / "run"
        job = Job(run_dir, uri)
        for first in range(1, 31, 10):
            job.log(range(first, first + 10))
            wait_until(lambda last=first + 9: last_step(run_dir, server.uri) == last)
        job.evaluate(30, fid=1.5, legibility=0.5)
        job.finish()
    assert_steps(run_dir, server.uri, range(1, 31))
    assert points_of(run_dir, server.uri, DISTANCE) == [(30, 1.5)]
    _, run = run_of(run_dir, server.uri)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.lr": "0.0001", "model.type": "dit"}
    assert run.data.tags["host"] == "here"
    assert images_of(job.info, server.uri) == [("samples", 30)]
    assert len(children_of(run_dir, server.uri)) == 1
    # Trackers of earlier tests may still ask servers that are gone.
    assert any(uri in line for line in warnings_of("dtr_scale.tracking.mirror"))


@pytest.mark.slow
def test_an_outage_loses_nothing_and_repeats_nothing(server, tmp_path, warnings_of):
    """One server dies under a tracker that lives on, a job that ends, and the job after it."""
    living, ending = tmp_path / "living", tmp_path / "ending"
    job = Job(living, server.uri)
    job.log(range(1, 21))
    earlier = Job(ending, server.uri)
    earlier.log(range(1, 31))
    earlier.finish("preempted")
    wait_until(lambda: last_step(living, server.uri) == 20)
    server.kill()

    job.log(range(21, 221))  # returns: nobody answers, nobody is asked
    job.evaluate(30, fid=2.5)
    wait_until(lambda: warnings_of("dtr_scale.tracking.mirror"))
    job.log(range(221, 241))
    # A job that ends meanwhile, resumed 10 steps back, says so and goes.
    command = [sys.executable, "-c", _SHORT_JOB, ending, server.uri, "0.5"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"dtr-scale tracking sync {ending}" in ended.stderr
    assert "Traceback" not in ended.stderr

    (warning,) = warnings_of("dtr_scale.tracking.mirror")  # one in an outage
    # Refused, or reset where the server died in the middle of a request.
    assert warning.endswith("the run directory keeps all, trying again") and len(warning) < 180
    server.start()
    job.log(range(241, 251))
    job.finish()
    assert_steps(living, server.uri, range(1, 251))
    assert points_of(living, server.uri, DISTANCE) == [(30, 2.5)]
    assert images_of(job.info) == [("samples", 30)]
    assert run_of(living, server.uri)[1].info.status == "FINISHED"
    assert run_of(ending, server.uri)[1].info.status == "KILLED"
    send_all(earlier.info)
    assert_steps(ending, server.uri, range(1, 41))
    assert run_of(ending, server.uri)[1].info.status == "FINISHED"
    assert [a.info.status for a in children_of(ending, server.uri)] == ["KILLED", "FINISHED"]


@contextlib.contextmanager
def _losing_replies(address, lost):
    """Serve a server behind a line that loses the reply to the n-th call that logs something."""
    calls = iter(range(1, 10_000))

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.create_connection(address) as upstream:
                request = _closing(self.request)
                upstream.sendall(request)
                reply = b"".join(iter(lambda: upstream.recv(65536), b""))
            if not (b"/runs/log-" in request.partition(b"\r\n")[0] and next(calls) in lost):
                self.request.sendall(reply)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as proxy:
        proxy.daemon_threads = True
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_address[1]}"
        finally:
            proxy.shutdown()  # or pytest would wait for the thread for ever
            thread.join()


def _closing(connection):
    """Read one whole HTTP request; return it with a request to close the connection after it."""
    with connection.makefile("rb") as file:
        lines = list(iter(file.readline, b"\r\n"))
        lengths = [int(line.split()[1]) for line in lines if line.lower().startswith(b"content-l")]
        body = file.read(*lengths) if lengths else b""
    lines = [line for line in lines if not line.lower().startswith(b"connection")]
    return b"".join([*lines, b"Connection: close\r\n\r\n", body])
