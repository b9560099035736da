"""Refuse an address of MLflow's that can never work, before a run begins."""

import contextlib
import os
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from dtr_scale.errors import ConfigError
from dtr_scale.tracking.uri import shown_uri, without_secrets

_ACCEPTED = "give http(s)://HOST:PORT, sqlite:///FILE, or a database whose driver is installed"
_TRUST = "set MLFLOW_TRACKING_SERVER_CERT_PATH to the certificate of the authority that signed it"
_PATIENCE_SECONDS = 5.0
# Its own time is over or has not come: a server mends that by itself, as an outage.
_UNTIMELY = {9, 10}  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_DATABASES = ("postgresql", "mysql", "mssql", "sqlite")


def check_uri(configured: str | None) -> None:
    """Raise ConfigError if MLflow can never be reached at the address that a run would use.

    A server is asked for its certificate alone. One that does not answer is an outage, which
    training outlives.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return
    scheme = uri.partition(":")[0].partition("+")[0].lower()
    try:
        if scheme in ("http", "https"):
            _check_server(uri)
        elif scheme in _DATABASES:
            _check_database(uri)
        else:
            from dtr_scale.tracking.mlflow import open_client

            open_client(uri)
    except Exception as error:  # of SQLAlchemy, drivers, the file system, MLflow
        reason = without_secrets(str(error).partition("\n")[0], uri)[:200].strip()
        if type(error).__name__.startswith("Unsupported"):  # MLflow's, which lists all it knows
            reason = f"MLflow knows no {scheme}://"
        source = "tracking.uri" if configured else "MLFLOW_TRACKING_URI"
        fix = _TRUST if isinstance(error, _DistrustError) else _ACCEPTED
        raise ConfigError(f"{source} = {shown_uri(uri)!r}: {reason}; {fix}") from None


class _DistrustError(Exception):
    """The server's certificate is signed by nobody who is trusted here, or for another host."""


def _check_server(uri: str) -> None:
    parts = urlsplit(uri)
    if not parts.hostname or parts.port == 0:  # the port itself raises ValueError
        raise ValueError("no host")
    if parts.scheme.lower() == "https":
        _check_certificate(uri)


def _check_certificate(uri: str) -> None:
    """Ask the server for anything, as MLflow's client does; its answer does not matter."""
    import requests

    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return
    # Without it, requests looks at REQUESTS_CA_BUNDLE.
    verify = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    try:
        requests.get(uri, verify=verify, timeout=_PATIENCE_SECONDS, stream=True).close()
    except requests.exceptions.SSLError as error:
        cause: BaseException | None = error
        while cause:
            if reason := _distrust(cause):
                told = f"the server's certificate is not trusted: {reason}"
                raise _DistrustError(told) from None
            cause = cause.__cause__ or cause.__context__
    except requests.exceptions.RequestException:
        pass  # an outage
    except OSError as error:  # the authorities' own file is missing
        raise _DistrustError(str(error)) from None


def _distrust(error: BaseException) -> str:
    """Return why a certificate can never be trusted here; "" for any other error."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "" if error.verify_code in _UNTIMELY else error.verify_message
    is_no_bundle = getattr(error, "reason", "") == "NO_CERTIFICATE_OR_CRL_FOUND"
    return "the file of authorities holds none" if is_no_bundle else ""


def _check_database(uri: str) -> None:
    """Import the driver; open a sqlite file, which is at hand, for writing."""
    import sqlalchemy

    is_sqlite = uri.startswith("sqlite")
    # No waiting for a lock: a file that somebody writes to is one that can be written.
    engine = sqlalchemy.create_engine(uri, connect_args={"timeout": 0} if is_sqlite else {})
    path = engine.url.database
    if not is_sqlite or not path:
        return
    if not path.startswith((":", "file:")):
        Path(path).parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
    with contextlib.closing(engine.raw_connection()) as connection:
        try:
            connection.cursor().execute("BEGIN IMMEDIATE")
            connection.rollback()
        except Exception as error:
            if "locked" not in str(error):  # somebody writes to it, so it can be written
                raise
    engine.dispose()
