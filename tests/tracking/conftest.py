"""A MLflow server that can be killed, and the tracker's own patience made short."""

import contextlib
import os
import shutil
import signal
import subprocess
import sysconfig
import time
import urllib.request

import pytest

from dtr_scale.tracking import mirror
from tests.support.processes import PATIENCE_SECONDS, free_port


class MlflowServer:
    """`mlflow server` over a sqlite file; it can be killed and started again."""

    def __init__(self, directory):
        self._directory = directory
        binary = shutil.which("mlflow", path=sysconfig.get_path("scripts"))
        assert binary, "the MLflow server is missing; fix: pip install dtr-scale"
        self.address = host, port = "127.0.0.1", free_port()
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
        # It imports for over a minute where all cores are busy.
        deadline = time.monotonic() + 2 * PATIENCE_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health").close()
                return
            time.sleep(0.1)
        self.kill()
        raise AssertionError((self._directory / "server.log").read_text())

    def kill(self):
        os.killpg(self._process.pid, signal.SIGKILL)  # it has a worker process
        self._process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture
def short_waits(monkeypatch):
    """What the tracker sets stays in the test; a call to a dead server fails at once."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "WARNING")
    monkeypatch.setattr(mirror, "_SECONDS_BETWEEN_SENDS", 0.0)
    monkeypatch.setattr(mirror, "_FINISH_SECONDS", 60.0)
