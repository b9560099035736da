"""What MLflow's server loses, refuses or hears of passwords costs a run nothing."""

import contextlib
import os
import socket
import socketserver
import subprocess
import sys
import threading

import pytest

from dtr_scale.tracking import mirror
from dtr_scale.tracking.mirror import send_all
from tests.support.mlflow_jobs import (
    DISTANCE,
    Job,
    assert_steps,
    children_of,
    images_of,
    last_step,
    points_of,
    run_of,
)
from tests.support.processes import wait_for

pytestmark = pytest.mark.usefixtures("short_waits")

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
            wait_for(lambda last=first + 9: last_step(run_dir, server.uri) == last)
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
    wait_for(lambda: last_step(living, server.uri) == 20)
    server.kill()

    job.log(range(21, 221))  # returns: nobody answers, nobody is asked
    job.evaluate(30, fid=2.5)
    wait_for(lambda: warnings_of("dtr_scale.tracking.mirror"))
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
