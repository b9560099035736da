"""Compare two experiments, and tell what makes another run from what may change between jobs."""

from pathlib import PurePath
from typing import Any, NamedTuple

from dtr_scale.config.load import PATHS, filled_in, validate
from dtr_scale.errors import ConfigError

# Batch size, seed, lanes and windows decide which sample comes when. data.shards is not here: the
# same data may move, so its manifest's hash is compared instead (jobs/resume.py).
_IDENTITY = (
    "model.",
    "diffusion.",
    "objective.",
    "train.global_batch_size",
    "train.seed",
    "train.freeze",
    "data.num_lanes",
    "data.window_shards",
    "data.horizontal_flip",
)
# Kernels round differently, and a learning rate may be mended: the run stays what it is.
_CHANGEABLE = ("model.attention", "objective.lr")


class Change(NamedTuple):
    """A setting that is not what it was."""

    key: str
    before: Any
    after: Any
    identity: bool = False
    """A run with another value is another run."""

    def __str__(self) -> str:
        return f"{self.key} was {self.before!r} and is {self.after!r}"


def changes(stored: dict[str, Any], wanted: dict[str, Any], source: str) -> list[Change]:
    """Return where two resolved experiments differ.

    Engine, ranks, micro-batches, learning rates, logging and the like may change from one job of a
    run to the next; network, diffusion, objective, batch size, seed, order of samples and mirroring
    are what the run is.
    """
    before, after = flatten(_filled_in(stored, source)), flatten(wanted)
    return [
        Change(key, before.get(key), after.get(key), _is_identity(key))
        for key in sorted(before.keys() | after.keys())
        if not _is_same(key, before.get(key), after.get(key))
    ]


def _filled_in(stored: dict[str, Any], source: str) -> dict[str, Any]:
    """Return a stored experiment with the defaults of keys that are newer than it.

    One that the schema refuses was trained all the same: it is compared as it is.
    """
    try:
        return filled_in(validate(stored, source))
    except ConfigError:
        return stored


def _is_same(key: str, before: Any, after: Any) -> bool:  # noqa: ANN401
    if before == after:
        return True
    if key not in PATHS or not (isinstance(before, str) and isinstance(after, str)):
        return False
    # Older runs kept paths as they were given, from a folder that nobody knows now.
    short, full = (PurePath(path.removeprefix("sqlite:///")).parts for path in (before, after))
    return full[-len(short) :] == short


def _is_identity(key: str) -> bool:
    return key.startswith(_IDENTITY) and key not in _CHANGEABLE


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one with dotted keys: {"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        # An empty dict stays a value, or the key would be in neither comparison.
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
