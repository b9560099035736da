"""Describe a run to MLflow, in tracking.json: whoever sends later needs the run directory alone."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dtr_scale.errors import ConfigError
from dtr_scale.storage.folder import open_folder

DESCRIPTION = "tracking.json"


@dataclass(frozen=True)
class Description:
    """What MLflow is told of a run, but for what it has measured."""

    training: str
    """The id that is kept with the checkpoints: of one training, wherever it goes on."""
    experiment: str
    name: str
    step: int
    """The step that the newest job has gone on from."""
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    expected: Mapping[str, float] = field(default_factory=dict)
    """Published figures of the same setting."""
    dataset: Mapping[str, str] | None = None
    """name, digest, source and summary."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The data's summary."""

    def write(self, run_dir: Path) -> None:
        text = json.dumps(asdict(self), indent=2) + "\n"
        open_folder(run_dir).write_bytes(DESCRIPTION, text.encode())


@dataclass(frozen=True)
class RunInfo:
    """A run as it is mirrored: its directory, its server, and what is told of it."""

    run_dir: Path
    journal: Path
    uri: str
    home: Path | None
    """Where a database's artifacts lie; None for a server."""
    description: Description
    checkpoints: Callable[[], Mapping[int, str]] = dict
    """Returns the URLs of the kept checkpoints by their steps."""


def read_description(run_dir: Path) -> Description:
    """Return what the newest job has told; ConfigError if none has."""
    try:
        return Description(**json.loads((run_dir / DESCRIPTION).read_bytes()))
    except OSError:
        reason = f"has no {DESCRIPTION}"
    except (ValueError, TypeError) as error:
        reason = f"has a damaged {DESCRIPTION} ({error})"
    raise ConfigError(
        f"{str(run_dir)!r} {reason}; give the directory of a run that `dtr-scale train` wrote with "
        "tracking.type=mlflow"
    )
