"""A real MLflow server over a real PostgreSQL, whose cluster an unprivileged user owns."""

import contextlib
import os
import pwd
import secrets
import shutil
import subprocess
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.processes import PATIENCE_SECONDS, free_port

USER = "postgres"  # of Debian's package; PostgreSQL refuses to run as root
_DYING_WITH_US = ("setpriv", "--pdeathsig", "KILL")
_AS_USER = (*_DYING_WITH_US, f"--reuid={USER}", f"--regid={USER}", "--clear-groups")


@contextlib.contextmanager
def mlflow_server(folder: Path, host: str) -> Iterator[str]:
    """Start both, MLflow at the address `host` of this machine; yield its URI."""
    mlflow = shutil.which("mlflow", path=sysconfig.get_path("scripts"))
    assert mlflow, "the MLflow server is missing; fix: pip install dtr-scale"
    port = free_port(host)
    with _postgres() as database, (folder / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(
            [*_DYING_WITH_US, mlflow, "server", "--host", host, "--port", str(port),
             "--workers", "1", "--backend-store-uri", database,
             "--artifacts-destination", str(folder / "artifacts")],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        uri = f"http://{host}:{port}"
        try:
            _wait_for(lambda: _answers(f"{uri}/health"), server, folder / "mlflow.log")
            yield uri
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, 9)  # it has a worker process
            server.wait()


@contextlib.contextmanager
def _postgres() -> Iterator[str]:
    """Start PostgreSQL with a new cluster and one user; yield the database's URI."""
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
    assert programs, "PostgreSQL is missing; fix: install Debian's package postgresql"
    # Not in pytest's folder, which no other user may enter.
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        folder, password, port = Path(name), secrets.token_hex(16), free_port()
        (folder / "password").write_text(password)
        for path in (folder, folder / "password"):
            os.chown(path, pwd.getpwnam(USER).pw_uid, -1)
        data = folder / "data"
        init = ("initdb", "--username=mlflow", "--auth=scram-sha-256", "--no-sync")
        options = (f"--pwfile={folder}/password", "-D", str(data))
        subprocess.run(
            [*_AS_USER, str(programs / init[0]), *init[1:], *options],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        settings = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        settings |= {"fsync": "off"}  # the cluster is lost with the machine anyway
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [*_AS_USER, str(programs / "postgres"), "-D", str(data),
                 *(f"--{key}={value}" for key, value in settings.items())],
                cwd=folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        ready = [str(programs / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={port}"]
        try:
            _wait_for(lambda: subprocess.run(ready).returncode == 0, server, folder / "log")
            yield f"postgresql+psycopg://mlflow:{password}@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()
            server.wait()


def _wait_for(condition: Callable[[], bool], server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(url).close()
        return True
    return False
