"""An address of MLflow's that can never work is refused before a run begins."""

import socket
import sqlite3
from pathlib import Path

import pytest

from dtr_scale.cli.main import main
from dtr_scale.errors import ConfigError
from dtr_scale.tracking.check import check_uri
from dtr_scale.tracking.uri import shown_uri, without_secrets

DEMO = Path(__file__).parents[2] / "configs" / "demo_digits.json"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")  # a proxy may answer in place of nobody


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("foo://user:hunter2@x", "unsupported URI 'foo://x'"),
        ("./mlruns", "filesystem tracking backend"),
        ("http://", "no host"),
        ("http://host:port", "Port could not be cast"),
        ("postgresql+nobody://u:hunter2@host/db", "postgresql.nobody"),
        ("postgresql://u:hunter2@host:port/db", "invalid literal"),
        ("mssql+pymssql://u:hunter2@host/db", "No module named 'pymssql'"),
        ("sqlite:////proc/none/mlflow.db", "No such file"),
        ("sqlite:////dev/null/mlflow.db", "File exists"),
        (f"sqlite:///{DEMO}", "file is not a database"),
    ],
)
def test_what_can_never_work_is_refused_in_one_line(uri, reason, monkeypatch):
    for source in ("tracking.uri", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ConfigError) as refusal:
            check_uri(uri if source == "tracking.uri" else None)
        message = str(refusal.value)
        assert message.startswith(f"{source} = {shown_uri(uri)!r}: ")
        assert reason in message and "\n" not in message and "hunter2" not in message


def test_what_may_work_is_accepted(tmp_path):
    """A server that does not answer is an outage; a database that is in use can be written."""
    check_uri(None)
    check_uri("http://127.0.0.1:9")
    check_uri("https://user:password@nowhere.invalid/mlflow")
    path = tmp_path / "new" / "mlflow.db"
    check_uri(f"sqlite:///{path}")
    with sqlite3.connect(path) as connection:
        connection.execute("BEGIN IMMEDIATE")
        check_uri(f"sqlite:///{path}")
    connection.close()


def test_a_missing_file_of_authorities_is_refused_with_its_variable(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "/nowhere.pem")
    with pytest.raises(ConfigError, match=r"/nowhere\.pem; set MLFLOW_TRACKING_SERVER_CERT_PATH"):
        check_uri("https://127.0.0.1:9")


def test_a_file_that_holds_no_authority_is_refused_with_its_variable(monkeypatch):
    """The client reads it once it is connected, so somebody has to listen."""
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(DEMO))
    trust = r"file of authorities holds none; set MLFLOW_TRACKING_SERVER_CERT_PATH"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(ConfigError, match=trust),
    ):
        check_uri(f"https://127.0.0.1:{server.getsockname()[1]}")


def test_a_run_is_refused_before_its_directory_is_made(tmp_path, capsys):
    run_dir = tmp_path / "run"
    arguments = ["train", "--config", str(DEMO), f"--run_dir={run_dir}", "--tracking.uri=foo://x"]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "tracking.uri = 'foo://x'" in line
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("http://user:pa%20ss@host", "login of user with pa ss or pa%20ss failed at http://host"),
        ("http://user:p@ss@host", "cannot resolve http://user:p@ss@host/api"),
        ("http://host?password=a%2Fb", "Max retries exceeded with url: /?password=a%2Fb/api"),
        ("http://token0@host", "API request to http://token0@host/api failed"),
    ],
)
def test_nothing_secret_is_left_in_a_message(uri, text):
    shown = without_secrets(text, uri)
    for secret in ("pa ss", "pa%20ss", "p@ss", "a%2Fb", "a/b", "token0"):
        assert secret not in shown
    assert "host" in shown or "retries" in shown
