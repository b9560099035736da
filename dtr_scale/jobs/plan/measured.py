"""Correct the roofline by a measurement on the same kind of GPU."""

import json
from pathlib import Path
from typing import Any

from dtr_scale.config.load import validate
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.bench.report import read_report
from dtr_scale.jobs.plan.cluster import Cluster
from dtr_scale.jobs.plan.gpus import Gpu, named
from dtr_scale.jobs.plan.planner import Planner


def measured_factor(path: Path, gpu: Gpu, gpus: int) -> float:
    """Return how much longer computing takes than modelled, by a `bench train --json` of a GPU.

    The report's own experiment is modelled on its own ranks, at most `gpus` of them on a node. A
    plan of the same experiment on the same ranks then has the measured step.
    """
    report = read_report(path, "train", option="--measured")
    device, ranks = report["machine"]["device"], report["machine"]["ranks"]
    if not named(gpu, device):
        raise ConfigError(
            f"--measured={path} is of {device!r}, --gpu={gpu.name} is a {gpu.title}; measure "
            "there, or plan for the GPU that was measured"
        )
    experiment = validate({"name": "measured", **_nested(report["config"])}, source=str(path))
    per_node = min(gpus, ranks)
    planner = Planner(experiment, Cluster(gpu, per_node, max(1, ranks // per_node)))
    step = planner.step(planner.layout())
    return (report["step_seconds"]["median"] - step.exposed) / (step.total - step.exposed)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Return sections of what is flat by dotted keys."""
    made: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        node = made
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return json.loads(json.dumps(made))
