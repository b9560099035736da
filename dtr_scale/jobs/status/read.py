"""Find the runs at the places that a user gives, and tell how they stand."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dtr_scale.errors import ConfigError
from dtr_scale.jobs.status.run import is_run, read_run
from dtr_scale.jobs.status.state import RunStatus
from dtr_scale.jobs.status.stored import read_checkpoint_dir
from dtr_scale.storage.folder import open_folder


def read_status(places: Sequence[str]) -> list[RunStatus]:
    """Return how the runs at some places stand.

    A place is a run directory, a folder of them, or a checkpoint.dir, also s3://. ConfigError where
    there is no run.
    """
    found: list[RunStatus] = []
    for place in places:
        try:
            found += _read_place(place)
        except OSError as error:
            raise ConfigError(
                f"{place[:200]} cannot be read: {error.strerror or error}; give a place that this "
                "user can read"
            ) from None
    return found


def _read_place(place: str) -> Iterable[RunStatus]:
    if "://" in place:
        return [read_checkpoint_dir(open_folder(place))]
    path = Path(place)
    if is_run(path):
        return [read_run(path)]
    below = sorted(path.iterdir()) if path.is_dir() else []
    if runs := [child for child in below if is_run(child)]:
        return [read_run(run) for run in runs]
    return [read_checkpoint_dir(open_folder(path))]
