"""Tell in which settings several runs differ."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from dtr_scale.evaluation.comparison.record import RunRecord

_OF_THE_RESULT = ("model", "diffusion", "objective", "data", "train")
"""Sections that decide what is trained; the others are about how it is run and looked at."""
_NAMES = {"$schema", "name", "description"}
# Kernels round differently, and these decide about speed and memory alone.
_OF_THE_MACHINE = {
    "model.attention",
    "data.num_workers",
    "data.cache_dir",
    "data.cache_gb",
    "data.storage_options",
    "train.micro_batch_size",
    "train.log_every",
    "train.max_minutes",
}
_OF_THE_LOSS = (
    "diffusion.",
    "model.learn_sigma",
    "model.in_channels",
    "model.input_size",
    "model.num_experts",
    "model.expert",
    "data.manifest_hash",
)


class Difference(NamedTuple):
    """A setting that is not the same in all runs."""

    key: str
    values: Sequence[str]
    """Of each run; "" where it is not known."""
    matters: bool
    """It decides what is trained, not only how it is run and looked at."""


def setting_differences(runs: Sequence[RunRecord]) -> list[Difference]:
    """Return the settings that differ, those that decide what is trained first."""
    hashes = [run.facts.get("manifest_hash") for run in runs]
    settings = [
        # The same data may lie in two places, and two data sets in turn at the same place.
        {**run.settings, "data.manifest_hash": data} if all(hashes) else run.settings
        for run, data in zip(runs, hashes, strict=True)
    ]
    found = []
    for key in dict.fromkeys(key for each in settings for key in each):
        values = [_text(each[key]) if key in each else "" for each in settings]
        if key not in _NAMES and len(set(values)) > 1:
            found.append(Difference(key, values, _matters(key)))
    return sorted(found, key=lambda difference: not difference.matters)


def loss_cautions(differences: Sequence[Difference]) -> list[str]:
    """Return the keys for which losses of the runs are different numbers."""
    return [d.key for d in differences if d.key.startswith(_OF_THE_LOSS)]


def _matters(key: str) -> bool:
    known = key in _OF_THE_MACHINE or key.startswith("data.storage_options.")
    return key.partition(".")[0] in _OF_THE_RESULT and not known


def _text(value: Any) -> str:  # noqa: ANN401
    return value if isinstance(value, str) else json.dumps(value)
