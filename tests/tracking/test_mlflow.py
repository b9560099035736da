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
from pathlib import Path

import pytest

from dtr_scale.config.changes import flatten
from dtr_scale.config.load import load_experiment, resolved
from dtr_scale.tracking import mirror, mlflow
from dtr_scale.tracking.journal import Journal
from dtr_scale.tracking.mirror import MlflowTracker
from dtr_scale.tracking.mlflow import RunInfo
from dtr_scale.tracking.uri import tracking_uri

# mlflow 3.17 declares its tables with a loader strategy that SQLAlchemy 2.1 retires.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
DEMO = Path(__file__).parents[2] / "configs" / "demo_digits.json"
PARAMS, TAGS = {"train.lr": 1e-4, "model.variant": None}, {"host": "here"}


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


class Job:
    """One job of a run that goes on from a step: its journal and its tracker."""

    def __init__(self, run_dir, uri, *, step=0, params=PARAMS, tags=TAGS):
        run_dir.mkdir(exist_ok=True)
        self.run_dir = run_dir
        self.journal = Journal(run_dir / "journal.jsonl", step=step)
        info = RunInfo(
            run_dir=run_dir, journal=self.journal.path, uri=tracking_uri(uri, run_dir),
            experiment="tests", name="a_run", params=params, tags=tags, step=step,
        )  # fmt: skip
        self.tracker = MlflowTracker(info)

    def log(self, steps, *, scale=1):
        for step in steps:
            record = {"step": step, "loss": scale / step, "lr": 0.1}
            self.journal.write(record)
            self.tracker.log(record)

    def finish(self, outcome="finished", checkpoint_url=None):
        self.journal.close()
        self.tracker.finish(outcome, checkpoint_url)


def run_of(run_dir, uri):
    """Return (client, run) of what a run directory says is its MLflow run."""
    from mlflow import MlflowClient

    kept = json.loads((run_dir / "mlflow.json").read_text(encoding="utf-8"))
    client = MlflowClient(uri)
    return client, client.get_run(kept["run_id"])


def points_of(run_dir, uri, key="loss"):
    client, run = run_of(run_dir, uri)
    return [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, key)]


def assert_steps(run_dir, uri, steps):
    """Each step stands there once, with its numbers."""
    assert sorted(points_of(run_dir, uri)) == [(step, 1 / step) for step in steps]
    assert sorted(points_of(run_dir, uri, "lr")) == [(step, 0.1) for step in steps]


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
    assert tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri(None, tmp_path) == "http://environment"
    assert tracking_uri("http://configured", tmp_path) == "http://configured"


def test_without_a_server_a_database_in_the_run_directory_has_it_all(tmp_path):
    overrides = ['--data.storage_options={"key": "KEY0", "secret": "SECRET0", "region": "here"}']
    experiment = load_experiment(DEMO, overrides)
    run_dir = tmp_path / "run"
    job = Job(run_dir, None, params=flatten(resolved(experiment)))
    picture = tmp_path / "step_2.png"
    picture.write_bytes(b"a picture")
    job.log(range(1, 1200))  # more points than one call takes
    job.tracker.log_evaluation(2, {"frechet_distance": 1.5}, picture)
    job.finish("finished", "s3://bucket/step_00001199")

    uri = tracking_uri(None, run_dir)
    assert_steps(run_dir, uri, range(1, 1200))
    assert points_of(run_dir, uri, "frechet_distance") == [(2, 1.5)]
    _, run = run_of(run_dir, uri)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a_run")
    assert run.data.tags["host"] == "here"
    assert run.data.tags["checkpoint"] == "s3://bucket/step_00001199"
    params = run.data.params
    assert (params["train.lr"], params["model.variant"]) == ("0.001", "None")
    assert params["data.storage_options.region"] == "here"
    assert len(params) == len(flatten(resolved(experiment)))
    (stored,) = (run_dir / "mlflow_artifacts").rglob("step_2.png")
    assert stored.read_bytes() == b"a picture"
    for path in run_dir.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert b"KEY0" not in content and b"SECRET0" not in content, path


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
    assert "changed.model.variant" not in run.data.tags
    assert_steps(tmp_path, server.uri, range(1, 31))


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
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"a picture")
    run_dir = tmp_path / "run"
    job = Job(run_dir, server.uri)
    job.log(range(1, 31))
    job.tracker.log_evaluation(10, {"frechet_distance": 5.0}, picture)
    job.tracker.log_evaluation(25, {"frechet_distance": 4.0}, picture)
    job.finish("failed")
    client, old = run_of(run_dir, server.uri)

    job = Job(run_dir, server.uri, step=20, params=PARAMS | {"train.lr": 5e-4})
    job.log(range(21, 23))  # as before: the points are there
    job.log(range(23, 26), scale=3)
    job.tracker.log_evaluation(25, {"frechet_distance": 3.0}, picture)
    job.finish("preempted")
    _, new = run_of(run_dir, server.uri)
    assert new.info.run_id != old.info.run_id
    steps = [(step, (3 if step > 22 else 1) / step) for step in range(1, 26)]
    assert sorted(points_of(run_dir, server.uri)) == steps
    assert points_of(run_dir, server.uri, "frechet_distance") == [(10, 5.0), (25, 3.0)]
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


def test_an_odd_key_costs_nothing_but_its_characters(server, tmp_path, monkeypatch, warnings_of):
    odd = {"expected.FID@50k": 2.06, "expected.FID 50k": 3, "expected.FID_50k": 4, "a//b": 5}
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"a picture")
    run_dir = tmp_path / "run"
    job = Job(run_dir, server.uri, params=PARAMS | odd, tags=TAGS | {"~user": "me"})
    job.log(range(1, 4))
    job.tracker.log_evaluation(3, {"FID@50k": 2.0, "legibility": 0.5}, picture)
    job.finish()
    _, run = run_of(run_dir, server.uri)
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "train.lr": "0.0001", "model.variant": "None", "expected.FID_50k": "2.06",
        "expected.FID 50k": "3", "expected.FID_50k_2": "4", "a__b": "5",
    }  # fmt: skip
    assert (run.data.tags["_user"], run.data.metrics["FID_50k"]) == ("me", 2.0)
    assert run.data.metrics["legibility"] == 0.5

    # What a server refuses all the same, by rules of its own, costs nothing else.
    monkeypatch.setattr(mlflow, "valid_names", lambda entries: entries)
    job = Job(run_dir, server.uri, step=3, params=PARAMS | {"FID@5k": 1, "last": 2})
    job.log([4])
    job.finish()
    _, run = run_of(run_dir, server.uri)
    assert (run.info.status, run.data.params["last"]) == ("FINISHED", "2")
    assert_steps(run_dir, server.uri, range(1, 5))
    assert warnings_of("dtr_scale.tracking.mlflow") == ["MLflow takes no param 'FID@5k'"]


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
from dtr_scale.tracking.journal import Journal
from dtr_scale.tracking.mlflow import RunInfo

mirror._FINISH_SECONDS, mirror._FINISH_SECONDS_IF_AWAY = float(sys.argv[3]), 0.1
setup_logging(0)
run_dir, uri = pathlib.Path(sys.argv[1]), sys.argv[2]
journal = Journal(run_dir / "journal.jsonl", step=20)
tracker = mirror.MlflowTracker(RunInfo(
    run_dir=run_dir, journal=journal.path, uri=uri, experiment="tests", name="a_run",
    params={}, tags={}, step=20,
))
for step in range(21, 41):
    journal.write({"step": step, "loss": 1 / step, "lr": 0.1})
    tracker.log({"step": step})
tracker.finish("finished", None)
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
    command = [sys.executable, "-c", _SHORT_JOB, tmp_path, uri, "60"]
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

    monkeypatch.setattr(mirror, "MlflowRun", fail)
    monkeypatch.setattr(mirror, "_FINISH_SECONDS_IF_AWAY", 0.0)
    Job(tmp_path, uri).finish()
    told = warnings_of("dtr_scale.tracking.mirror")
    assert "no answer from http://127.0.0.1:9" in told[0]
    assert not any(secret in line for secret in _SECRETS for line in told)


def test_lost_replies_neither_repeat_nor_lose_anything(server, tmp_path, monkeypatch, warnings_of):
    monkeypatch.setattr(mirror, "_FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(mirror, "_SECONDS_BETWEEN_WARNINGS", 0.0)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"a picture")
    with _losing_replies(server.address, lost=[1, 3, 5, 8, 10]) as uri:
        run_dir = tmp_path / "run"
        job = Job(run_dir, uri)
        for first in range(1, 31, 10):
            job.log(range(first, first + 10))
            wait_until(lambda last=first + 9: last_step(run_dir, server.uri) == last)
        job.tracker.log_evaluation(30, {"frechet_distance": 1.5, "legibility": 0.5}, picture)
        job.finish()
    assert_steps(run_dir, server.uri, range(1, 31))
    assert points_of(run_dir, server.uri, "frechet_distance") == [(30, 1.5)]
    client, run = run_of(run_dir, server.uri)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.lr": "0.0001", "model.variant": "None"}
    assert run.data.tags["host"] == "here"
    (artifact,) = client.list_artifacts(run.info.run_id, "samples")
    assert artifact.path == "samples/picture.png"
    # Trackers of earlier tests may still ask servers that are gone.
    assert sum(uri in line for line in warnings_of("dtr_scale.tracking.mirror")) == 5


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
    job.tracker.log_evaluation(30, {"frechet_distance": 2.5}, DEMO)
    wait_until(lambda: warnings_of("dtr_scale.tracking.mirror"))
    job.log(range(221, 241))
    # A job that ends meanwhile, resumed 10 steps back, says so and goes.
    command = [sys.executable, "-c", _SHORT_JOB, ending, server.uri, "0.5"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"the journal {ending}/journal.jsonl has them all" in ended.stderr
    assert "Traceback" not in ended.stderr

    (warning,) = warnings_of("dtr_scale.tracking.mirror")  # one a minute
    # Refused, or reset where the server died in the middle of a request.
    assert warning.endswith("the journal keeps all, trying again") and len(warning) < 180
    server.start()
    job.log(range(241, 251))
    job.finish()
    assert_steps(living, server.uri, range(1, 251))
    assert points_of(living, server.uri, "frechet_distance") == [(30, 2.5)]
    assert run_of(living, server.uri)[1].info.status == "FINISHED"
    assert run_of(ending, server.uri)[1].info.status == "KILLED"
    Job(ending, server.uri, step=40).finish()
    assert_steps(ending, server.uri, range(1, 41))
    assert run_of(ending, server.uri)[1].info.status == "FINISHED"


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
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()
        thread.join()


def _closing(connection):
    """Read one whole HTTP request; return it with a request to close the connection after it."""
    with connection.makefile("rb") as file:
        lines = list(iter(file.readline, b"\r\n"))
        lengths = [int(line.split()[1]) for line in lines if line.lower().startswith(b"content-l")]
        body = file.read(*lengths) if lengths else b""
    lines = [line for line in lines if not line.lower().startswith(b"connection")]
    return b"".join([*lines, b"Connection: close\r\n\r\n", body])
