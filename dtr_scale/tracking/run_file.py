"""Keep in mlflow.json which MLflow run a run directory has, so that every job goes on with it."""

import json
import logging
from pathlib import Path
from typing import Any

from dtr_scale.storage.folder import open_folder
from dtr_scale.tracking.uri import is_default_database, shown_uri

log = logging.getLogger(__name__)

RUN_FILE = "mlflow.json"


def read_run_file(run_dir: Path, uri: str) -> dict[str, Any] | None:
    """Return the content of mlflow.json, None if there is none or it is of another server."""
    path = run_dir / RUN_FILE
    try:
        kept = json.loads(path.read_bytes())
        # With the password left out, as it is stored: a new one does not make another server.
        is_this_server = kept["tracking_uri"] in (_stored_uri(run_dir, uri), shown_uri(uri))
        return kept | {"run_id": str(kept["run_id"])} if is_this_server else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        log.warning("%s does not name a run; MLflow gets a new one", path)
        return None


def write_run_file(run_dir: Path, uri: str, content: dict[str, Any]) -> None:
    text = json.dumps(content | {"tracking_uri": _stored_uri(run_dir, uri)}, indent=2) + "\n"
    open_folder(run_dir).write_bytes(RUN_FILE, text.encode())


def _stored_uri(run_dir: Path, uri: str) -> str | None:
    # The database beside the runs goes with them, wherever they are moved.
    return None if is_default_database(uri, run_dir) else shown_uri(uri)
