"""Choose MLflow's address, and leave its password out of what is shown and stored."""

import os
from pathlib import Path
from urllib.parse import parse_qsl, quote, quote_plus, unquote

from dtr_scale.logs import without_password


def tracking_uri(configured: str | None, run_dir: Path) -> str:
    """Return the configured server, else the environment's, else a sqlite file of the run."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or _own_database(run_dir)


def is_own_database(uri: str, run_dir: Path) -> bool:
    return uri == _own_database(run_dir)


def _own_database(run_dir: Path) -> str:
    return f"sqlite:///{(run_dir / 'mlflow.db').resolve()}"


def shown_uri(uri: str) -> str:
    """Return an address as it may be shown and stored."""
    return without_password(uri)


def without_secrets(text: str, uri: str) -> str:
    """Return a text, such as an error of MLflow's, without what `shown_uri` leaves out of `uri`."""
    shown = shown_uri(uri)
    text = text.replace(uri, shown)
    # The longest first: a short one may be a part of it.
    for secret in sorted(_secrets(uri), key=len, reverse=True):
        if secret not in shown:
            text = text.replace(secret, "***")
    return text


def _secrets(uri: str) -> set[str]:
    """Return the parts of an address that may be secret, as they are and quoted either way."""
    rest = uri.partition("://")[2]
    # A password may hold an "@", and so may the query.
    users = {rest.partition("@")[0], rest.rpartition("@")[0]} if "@" in rest else set()
    parts = {part for user in users for part in (user, user.partition(":")[2])}
    parts |= {value for _, value in parse_qsl(rest.partition("?")[2])}
    variants = {f(part) for part in parts for f in (str, quote, quote_plus, unquote)}
    return variants - {""}
