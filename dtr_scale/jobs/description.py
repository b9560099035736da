"""Describe an experiment to MLflow: params, tags and the data, as a table of runs shows them."""

import functools
import getpass
import json
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import dtr_scale
from dtr_scale.config.changes import flatten
from dtr_scale.config.load import resolved
from dtr_scale.config.schema import Experiment
from dtr_scale.data.manifest import Manifest
from dtr_scale.evaluation.flops import LayerCost
from dtr_scale.jobs.plan.compute import plan_compute
from dtr_scale.logs import without_password

# They say where a run is, or are told in places of their own.
_NOT_PARAMS = ("$schema", "name", "description", "run_dir", "tracking.", "expected.")
_ROUTINGS = ("dtr", "dtr_eq4", "cdtr", "ercddt", "random", "max_roaming")
# Keys that have a meaning for some values of another key alone.
_MEANT_FOR: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "model.context_length": ("model.conditioning", ("text",)),
    "model.context_dim": ("model.conditioning", ("text",)),
    "model.routing.alpha": ("model.routing.type", ("dtr", "dtr_eq4", "cdtr")),
    "model.routing.beta": ("model.routing.type", _ROUTINGS),
    "model.routing.num_clusters": ("model.routing.type", ("cdtr", "ercddt")),
    "model.routing.seed": ("model.routing.type", ("random", "max_roaming")),
    "model.routing.update_every_steps": ("model.routing.type", ("max_roaming",)),
    "engine.zero_stage": ("engine.type", ("deepspeed",)),
    "engine.deepspeed_config": ("engine.type", ("deepspeed",)),
    "engine.shard": ("engine.type", ("fsdp2",)),
    "engine.replicate": ("engine.type", ("fsdp2",)),
    "engine.reshard_after_forward": ("engine.type", ("fsdp2",)),
    "engine.exchange": ("engine.type", ("deepspeed", "fsdp2", "flat")),
    "objective.gamma": ("objective.type", ("min_snr", "p2")),
    "objective.k": ("objective.type", ("p2",)),
    "objective.clusters": ("objective.type", ("ant_uw",)),
    "objective.boundaries": ("objective.type", ("ant_uw",)),
    "objective.lr": ("objective.type", ("ant_uw",)),
    "train.decay_steps": ("train.schedule", ("wsd",)),
    "train.final_lr": ("train.schedule", ("cosine", "wsd")),
    "evaluation.eta": ("evaluation.sampler", ("ddim",)),
    "data.shards": ("data.type", ("shards",)),
    "data.storage_options": ("data.type", ("shards",)),
    "data.cache_dir": ("data.type", ("shards",)),
    "data.cache_gb": ("data.type", ("shards",)),
}


def network_cost(experiment: Experiment) -> LayerCost | None:
    """Return parameters and MACs of a network's forward; None where they cannot be counted."""
    try:
        return plan_compute(experiment).forward.total
    except Exception:  # it is told of the run, and not worth it
        return None


def params(
    experiment: Experiment, *, samples: int, ranks: int, cost: LayerCost | None
) -> dict[str, Any]:
    """Return the settings that mean something in an experiment, and what follows from them."""
    flat = flatten(resolved(experiment))
    found = {
        key: value
        for key, value in flat.items()
        if value not in (None, "", {}, [])
        and not f"{key}".startswith(_NOT_PARAMS)
        and has_meaning(key, flat)
    }
    train = experiment.train
    seen = train.max_steps * train.global_batch_size
    found |= {
        "engine.ranks": ranks,
        "data.samples": samples,
        "train.samples": seen,
        "train.epochs": round(seen / samples, 3) if samples else None,
    }
    if cost:
        found["model.parameters"] = cost.num_parameters
        # The GFLOPs of DiT's and DTR's tables are 10^9 MACs.
        found["model.gflops"] = round(cost.macs / 1e9, 3)
    return {key: value for key, value in found.items() if value is not None}


def tags(experiment: Experiment, *, ranks: int, device: str, run_dir: Path) -> dict[str, str]:
    """Return what runs are filtered and grouped by, and MLflow's own tags."""
    engine = experiment.engine
    found = {
        "model": experiment.model.title,
        "routing": experiment.model.routing.type,
        "weighting": experiment.objective.type,
        "dataset": dataset_name(experiment),
        "engine": engine_name(experiment),
        "precision": engine.precision,
        "world_size": str(ranks),
        "device": device,
        "host": socket.gethostname(),
        "run_dir": str(run_dir.resolve()),
        "dtr_scale.version": dtr_scale.__version__,
        "torch.version": torch.__version__,
        "mlflow.source.name": Path(sys.argv[0]).name.replace("__main__.py", "dtr-scale"),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
        "mlflow.source.git.commit": commit() or "",
        "mlflow.note.content": experiment.description,
    }
    return {key: value for key, value in found.items() if value}


def engine_name(experiment: Experiment) -> str:
    """Return the engine's type; of DeepSpeed's stages which one."""
    engine = experiment.engine
    return f"zero-{engine.zero_stage}" if engine.type == "deepspeed" else engine.type


def attempt_facts(world_size: int, hosts: list[str], device: str) -> dict[str, Any]:
    """Return where and how a job runs."""
    return {
        "hosts": list(dict.fromkeys(hosts)),
        "world_size": world_size,
        "device": device,
        "commit": commit(),
        "dtr_scale.version": dtr_scale.__version__,
        "torch.version": torch.__version__,
        "python.version": platform.python_version(),
    }


def dataset_name(experiment: Experiment) -> str:
    """Return the name of the folder that an experiment's data is in."""
    return Path(experiment.data.shards or "").name or experiment.data.type


def dataset(experiment: Experiment, manifest: Manifest) -> dict[str, str]:
    """Return the data set as MLflow names it: by its manifest's digest."""
    shards = without_password(experiment.data.shards or "")
    return {
        "name": dataset_name(experiment),
        "digest": manifest.hash("train"),
        # MLflow's page reads JSON here.
        "source": json.dumps({"uri": shards}) if shards else "{}",
        "summary": json.dumps(data_summary(manifest)["train"]),
    }


def data_summary(manifest: Manifest) -> dict[str, Any]:
    """Return what a manifest tells, without its shards."""
    told = {"shards", "class_names", "unreadable"}
    summary = manifest.model_dump(mode="json", exclude=told)
    for split in dict.fromkeys(shard.split for shard in manifest.shards) or ("train",):
        summary[split] = {
            "samples": manifest.num_samples(split),
            "shards": len(manifest.split(split)),
            "classes": manifest.num_classes,
            "hash": manifest.hash(split),
        }
    return summary


@functools.cache
def commit() -> str | None:
    """Return the git commit of this package's code, None if it is not a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip() or None


def has_meaning(key: str, flat: Mapping[str, Any]) -> bool:
    """Tell whether a key has an effect in an experiment of dotted keys."""
    for start, (other, values) in _MEANT_FOR.items():
        if f"{key}.".startswith(f"{start}."):
            return flat.get(other) in values
    return True


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return ""
