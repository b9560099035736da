"""Name metrics, params and tags as MLflow shows them: metrics in sections, and nothing it refuses.

The journal keeps flat keys. The tables below say where each stands in MLflow, whose charts are
grouped by what comes before a metric's "/".
"""

import posixpath
import re
from collections.abc import Mapping
from typing import Any

LOSS = "train/loss"

_METRICS = {
    "loss": LOSS,
    "objective": "train/objective",
    "mse": "train/mse",
    "vb": "train/vb",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "samples_per_second": "perf/samples_per_second",
    "data_wait_fraction": "perf/data_wait_fraction",
    "step_seconds": "perf/step_seconds",
    "slowest_rank": "perf/slowest_rank",
    "slowest_rank_seconds": "perf/slowest_rank_seconds",
    "median_rank_seconds": "perf/median_rank_seconds",
    "checkpoint_stall_seconds": "perf/checkpoint_stall_seconds",
    "tokens_per_second": "perf/tokens_per_second",
    "tflops": "perf/tflops",
    "mfu": "perf/mfu",
    "memory_gb": "perf/memory_gb",
    "power_watts": "perf/power_watts",
    # Axes that a chart can have instead of steps.
    "samples_seen": "samples_seen",
    "gpu_hours": "gpu_hours",
}
_NUMBERED_METRICS = {"loss_cluster_": "clusters/loss_", "uw_log_var_": "uw/log_var_"}
_SHORT_EVALUATIONS = {"inception_score": "is", "inception_score_std": "is_std"}
EVALUATED, SYSTEM = "eval/", "system/"
GOODPUT = "perf/goodput"
"""Not of the journal: a point at the end of each attempt."""

_MOST_CHARACTERS = 250  # MLflow's own limit


def metric_name(key: str) -> str:
    """Return where a key of the journal stands in MLflow; one that is not in the table in train/.

    >>> metric_name("loss"), metric_name("uw_log_var_3")
    ('train/loss', 'uw/log_var_3')
    """
    for start, name in _NUMBERED_METRICS.items():
        if key.startswith(start):
            return name + key.removeprefix(start)
    return _METRICS.get(key, f"train/{key}")


def journal_key(name: str) -> str | None:
    """Return which key of the journal stands at a metric's name; None for one of something else.

    >>> journal_key("train/loss"), journal_key("uw/log_var_3"), journal_key("eval/fid_10k")
    ('loss', 'uw_log_var_3', None)
    """
    for key, known in _METRICS.items():
        if name == known:
            return key
    for start, known in _NUMBERED_METRICS.items():
        if name.startswith(known):
            return start + name.removeprefix(known)
    return name.removeprefix("train/") if name.startswith("train/") else None


def evaluation_name(key: str, num_samples: int | None) -> str:
    """Return where a number of an evaluation stands in MLflow, with the samples it was made of.

    >>> evaluation_name("fid", 10_000), evaluation_name("inception_score", 50_000)
    ('eval/fid_10k', 'eval/is_50k')
    """
    name = _SHORT_EVALUATIONS.get(key, key)
    # A loss is of real samples; and some keys tell their number themselves.
    if num_samples and "loss" not in key and not re.search(r"[^A-Za-z]\d+k?$", key):
        thousands, rest = divmod(num_samples, 1000)
        name += f"_{num_samples}" if rest else f"_{thousands}k"
    return EVALUATED + name


def valid_names(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return `entries` by names that MLflow takes: other characters become `_`.

    MLflow takes letters, digits and `_-. :/`, and no name that is another one read as a path
    (`a//b`, `../a`). Names that become the same are numbered.
    """
    valid: dict[str, Any] = {}
    for key, value in entries.items():
        name = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", key)[:_MOST_CHARACTERS]
        # One such name would make MLflow refuse the whole call.
        if posixpath.normpath(name) != name or name.startswith((".", "/")):
            name = name.replace("/", "_").replace(".", "_") or "_"
        unique, number = name, 2
        while unique in valid:
            unique, number = f"{name[: _MOST_CHARACTERS - 4]}_{number}", number + 1
        valid[unique] = value
    return valid
