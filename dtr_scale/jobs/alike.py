"""Refuse ranks that are not of one run: other code, another experiment, other data."""

import hashlib
import socket
from functools import cache
from pathlib import Path
from typing import Any

import torch

import dtr_scale
from dtr_scale.config.changes import flatten
from dtr_scale.config.load import resolved
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import ConfigError

_NUM_TOLD = 5


def refuse_other_settings(world: World, experiment: Experiment) -> None:
    """Raise ConfigError on all ranks if one has other code or another experiment than rank 0.

    Every rank calls it. A node whose repository was not updated would go on differently, or wait
    in another collective for good.
    """
    code = {"dtr_scale": f"{dtr_scale.__version__} of {code_hash()[:12]}"}
    _refuse(world, "code", code | {"torch": torch.__version__}, "install the same on all nodes")
    settings = {f"--{key}": value for key, value in flatten(resolved(experiment)).items()}
    _refuse(world, "experiment", settings, "give all nodes the same file and the same overrides")


def refuse_other_data(world: World, shards: str | None, manifest_hash: str) -> None:
    """Raise ConfigError on all ranks if one reads another manifest than rank 0."""
    found = {f"the manifest of {shards}": manifest_hash[:12]}
    _refuse(world, "data", found, "copy the prepared data again, or give all nodes one folder")


@cache
def code_hash() -> str:
    """Return the hash of this package's Python files."""
    digest = hashlib.sha256()
    package = Path(dtr_scale.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _refuse(world: World, what: str, found: dict[str, Any], fix: str) -> None:
    if world.world_size == 1:
        return
    # What is compared first is small: a thousand ranks do not send a thousand experiments.
    digest = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()
    digests = world.all_gather_object((digest, socket.gethostname()))
    others = [rank for rank, (other, _) in enumerate(digests) if other != digests[0][0]]
    if not others:
        return
    first = others[0]
    everybody = world.all_gather_object(found if world.rank in (0, first) else None)
    ours, theirs = everybody[0], everybody[first]
    differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    told = [f"{key} is {theirs.get(key)!r}, not {ours.get(key)!r}" for key in differing]
    more = f" and {len(told) - _NUM_TOLD} more" if len(told) > _NUM_TOLD else ""
    named = ", ".join(f"{rank} on {digests[rank][1]}" for rank in others[:_NUM_TOLD])
    more_ranks = f" and {len(others) - _NUM_TOLD} more" if len(others) > _NUM_TOLD else ""
    # On every rank, each from the same answers: none is left waiting for the others.
    raise ConfigError(
        f"{what} of rank {named}{more_ranks} differs from that of rank 0 on {digests[0][1]}: "
        f"{', '.join(told[:_NUM_TOLD])}{more}; {fix}"
    )
