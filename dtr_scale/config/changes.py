"""Tell what makes two runs the same, and what may change from one job of a run to the next."""

from typing import Any, NamedTuple

from dtr_scale.config.load import resolved, validate

_IDENTITY = (
    "model.",
    "diffusion.",
    "objective.",
    "train.global_batch_size",
    "train.seed",
    "data.num_lanes",
    "data.window_shards",
    "data.horizontal_flip",
)
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
    # Keys that came after `stored` was written had their default's effect then.
    before, after = flatten(resolved(validate(stored, source))), flatten(wanted)
    return [
        Change(key, before.get(key), after.get(key), _is_identity(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _is_identity(key: str) -> bool:
    return key.startswith(_IDENTITY) and key not in _CHANGEABLE


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one with dotted keys: {"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
