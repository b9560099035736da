"""Choose MLflow's address, and leave its password out of what is shown and stored."""

import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, quote, quote_plus, unquote

from dtr_scale.logs import without_password

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
"""The names that `mlflow server` looks for in its working directory."""
_OF_A_RUN = re.compile(r"expert_\d+|replaced_\w+")  # folders of a run directory that are runs


def tracking_uri(configured: str | None, run_dir: Path) -> str:
    """Return the configured server, else the environment's, else a sqlite file beside the runs."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or _default_database(run_dir)


def is_default_database(uri: str, run_dir: Path) -> bool:
    return uri == _default_database(run_dir)


def artifact_home(uri: str, run_dir: Path) -> Path | None:
    """Return where pictures and files of a database's runs lie; None for a server, which knows.

    Beside a sqlite file, else beside the runs.
    """
    if uri.startswith("sqlite:///"):
        return Path(uri.removeprefix("sqlite:///").partition("?")[0]).parent / ARTIFACTS
    return None if uri.startswith(("http:", "https:")) else _home(run_dir) / ARTIFACTS


def _default_database(run_dir: Path) -> str:
    return f"sqlite:///{_home(run_dir) / DATABASE}"


def _home(run_dir: Path) -> Path:
    """Return the folder that a run directory lies in, or itself where nothing else can."""
    place = run_dir.absolute()
    while _OF_A_RUN.fullmatch(place.name):
        place = place.parent
    # A volume may be mounted at the run directory itself. The parent may have yet to be made.
    parent = next((p for p in place.parents if p.exists()), place)
    return place.parent if os.access(parent, os.W_OK) else place


def runs_page(uri: str, experiment_id: str, run_dir: Path) -> str:
    """Return where MLflow shows an experiment's runs as charts, and what serves it if nothing does.

    Its own first page is about language models.
    """
    page = f"#/experiments/{experiment_id}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    if uri.startswith(("http:", "https:")):
        return f"{shown_uri(uri).rstrip('/')}/{page}"
    served = f"mlflow server --backend-store-uri {shown_uri(uri)}"
    if is_default_database(uri, run_dir):
        # Of what it finds in its working directory.
        served = f"cd {_shortest(_home(run_dir))} && mlflow server"
    return f"{served}, then http://127.0.0.1:5000/{page}"


def _shortest(folder: Path) -> Path:
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


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
