"""An address of MLflow's that can never work is refused before a run begins."""

import socket
import sqlite3
import ssl
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dtr_scale.cli.main import main
from dtr_scale.errors import ConfigError
from dtr_scale.tracking.check import check_uri
from dtr_scale.tracking.uri import shown_uri, without_secrets

DEMO = Path(__file__).parents[2] / "configs" / "demo_digits.json"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("URI", "INSECURE_TLS", "SERVER_CERT_PATH"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")  # a proxy may answer in place of nobody


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("foo://user:hunter2@x", "MLflow knows no foo://; give http"),
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


@pytest.fixture
def https_server(tmp_path):
    """Start a server whose certificate has a time of its own; return its address and authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, form = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
    key_pem = key.private_bytes(form, private, serialization.NoEncryption())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    own_address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])

    def certificate(first_day, last_day):
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now + timedelta(first_day))
            .not_valid_after(now + timedelta(last_day))
            .add_extension(own_address, critical=False)
            .sign(key, hashes.SHA256())
        )
        path = tmp_path / "authority.pem"
        path.write_bytes(certificate.public_bytes(form))
        (tmp_path / "server.pem").write_bytes(path.read_bytes() + key_pem)
        return path

    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:

        def start(first_day, last_day):
            authority = certificate(first_day, last_day)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tmp_path / "server.pem")
            server.socket = context.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever, args=(0.01,)).start()
            return f"https://127.0.0.1:{server.server_port}", authority

        yield start
        server.shutdown()


@pytest.mark.parametrize(("first_day", "last_day"), [(-2, -1), (1, 2)], ids=["over", "to come"])
def test_a_certificate_at_the_wrong_time_is_an_outage(
    https_server, monkeypatch, first_day, last_day
):
    uri, authority = https_server(first_day, last_day)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(authority))
    check_uri(uri)


def test_an_unknown_authority_is_refused_unless_any_is_taken(https_server, monkeypatch):
    uri, _ = https_server(-1, 1)
    with pytest.raises(ConfigError, match="certificate is not trusted: self-signed"):
        check_uri(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")  # as MLflow's client reads it
    check_uri(uri)


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
