"""Refuse an address of MLflow's that can never work, before a run begins."""

import contextlib
import os
from pathlib import Path
from urllib.parse import urlsplit

from dtr_scale.errors import ConfigError
from dtr_scale.tracking.mlflow import open_client
from dtr_scale.tracking.uri import shown_uri, without_secrets

_DATABASES = ("postgresql", "mysql", "mssql", "sqlite")


def check_uri(configured: str | None) -> None:
    """Raise ConfigError if MLflow can never be reached at the address that a run would use.

    No server is asked. One that does not answer is an outage, which training outlives.
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
            open_client(uri)
    except Exception as error:  # of SQLAlchemy, drivers, the file system, MLflow
        reason = without_secrets(str(error).partition("\n")[0], uri)[:200].strip()
        source = "tracking.uri" if configured else "MLFLOW_TRACKING_URI"
        raise ConfigError(
            f"{source} = {shown_uri(uri)!r}: {reason}; give http(s)://HOST:PORT, "
            "sqlite:///FILE, or a database whose driver is installed"
        ) from None


def _check_server(uri: str) -> None:
    parts = urlsplit(uri)
    if not parts.hostname or parts.port == 0:  # the port itself raises ValueError
        raise ValueError("no host")


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
