"""Simulate a training on a thousand ranks, without training: its data, checkpoints and failures."""

import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from dtr_scale.config.schema import Experiment
from dtr_scale.jobs.plan.cluster import Cluster
from dtr_scale.jobs.plan.compute import meta_network
from dtr_scale.jobs.plan.gpus import GB
from dtr_scale.jobs.plan.run_plan import Terms, plan_run
from dtr_scale.jobs.plan.storage import storage_of
from dtr_scale.jobs.scale.checkpoints import (
    CheckpointFigures,
    flat_places,
    fsdp2_places,
    measure_checkpoint,
    network_parts,
)
from dtr_scale.jobs.scale.data import DataSize, measure_ranks, write_large_manifest
from dtr_scale.jobs.scale.failures import simulated_goodput

_SAMPLES_OF_A_RANK = 16
_WANTED_SECONDS, _WANTED_BYTES, _WANTED_GOODPUT = 1.0, 200e6, 0.99


class Scale(NamedTuple):
    """How large it is to be."""

    shards: int = 100_000
    samples: int = 10**9


def simulate(
    experiment: Experiment, cluster: Cluster, scale: Scale, terms: Terms
) -> dict[str, Any]:
    """Return the figures of an experiment at a scale, as plain JSON data."""
    experiment = _for_ranks(experiment, cluster.world_size)
    plan = plan_run(experiment, cluster, terms)
    with tempfile.TemporaryDirectory() as folder:
        data = _data(experiment, cluster, scale, Path(folder))
        checkpoints = _checkpoints(experiment, cluster, Path(folder))
    own = checkpoints["flat" if plan.chosen.layout.name != "fsdp2" else "fsdp2"]
    restart = plan.failures.restart_seconds + _index_seconds(own, cluster, terms)
    failures = replace(plan.failures, restart_seconds=restart)
    interval = plan.interval_steps * plan.chosen.step.total
    played = simulated_goodput(failures, interval)
    return {
        "model": experiment.model.title,
        "ranks": cluster.world_size,
        "cluster": cluster.title,
        "shards": scale.shards,
        "samples": scale.samples,
        "global_batch_size": experiment.train.global_batch_size,
        "step_seconds": plan.chosen.step.total,
        "data": data,
        "checkpoint_bytes": plan.storage.checkpoint,
        "checkpoints": {name: each._asdict() for name, each in checkpoints.items()},
        "seconds_between_failures": failures.seconds_between,
        "resume_seconds": restart,
        "write_seconds": failures.write_seconds,
        "stall_seconds": failures.stall_seconds,
        "every_steps": plan.interval_steps,
        "interval_seconds": interval,
        "goodput": failures.goodput(interval),
        "simulated_goodput": {"mean": mean(played), "min": min(played)},
    }


def _for_ranks(experiment: Experiment, ranks: int) -> Experiment:
    """Return the experiment with a batch that so many ranks can share."""
    batch = max(experiment.train.global_batch_size, ranks * _SAMPLES_OF_A_RANK)
    micro = min(experiment.train.micro_batch_size, batch // ranks)
    train = {"global_batch_size": batch // ranks * ranks, "micro_batch_size": micro}
    return experiment.model_copy(update={"train": experiment.train.model_copy(update=train)})


def _data(experiment: Experiment, cluster: Cluster, scale: Scale, folder: Path) -> dict[str, Any]:
    sample_bytes = storage_of(experiment, 0, ranks=1, micro_batch_size=1).sample
    found: dict[str, Any] = {}
    # As one stream, and with a lane for each node, which then reads its part of the shards alone.
    for lanes in dict.fromkeys((1, cluster.nodes)):
        size = DataSize(
            shards=scale.shards,
            samples=scale.samples,
            global_batch_size=experiment.train.global_batch_size,
            world_size=cluster.world_size,
            ranks_of_a_node=cluster.gpus,
            num_lanes=lanes,
            window_shards=experiment.data.window_shards,
        )
        if not found:
            found["manifest_bytes"] = write_large_manifest(folder, size, sample_bytes)
        ranks = dict.fromkeys((0, size.world_size // 2, size.world_size - 1))
        figures = measure_ranks(folder, size, list(ranks)).values()
        worst = {key: max(getattr(f, key) for f in figures) for key in next(iter(figures))._fields}
        found[f"lanes_{lanes}"] = worst
    return found


def _checkpoints(
    experiment: Experiment, cluster: Cluster, folder: Path
) -> dict[str, CheckpointFigures]:
    with torch.device("meta"):
        network, *_ = meta_network(experiment)
    parts = network_parts(network, network.routed_blocks())
    shapes = {name: tuple(p.shape) for part in parts for name, p in part.items()}
    train, ranks = experiment.train, cluster.world_size
    averages = 1 + len(train.ema_decays) + len(train.ema_sigma_rel)
    held = {
        "flat": flat_places(parts, ranks),
        "fsdp2": fsdp2_places(parts, ranks, ranks),
        "hsdp": fsdp2_places(parts, ranks, cluster.gpus),
    }
    return {
        name: measure_checkpoint(places, shapes, averages, folder / name)
        for name, places in held.items()
    }


def _index_seconds(figures: CheckpointFigures, cluster: Cluster, terms: Terms) -> float:
    """Return how long a node's ranks take to read the index, each for itself."""
    return figures.open_seconds + cluster.gpus * figures.index_bytes / (terms.storage_gb * GB)


def scale_table(found: dict[str, Any]) -> str:
    """Return the figures as lines for a terminal, with what was wanted beside them."""
    lines = [
        f"{found['ranks']:,} ranks ({found['cluster']}), {found['shards']:,} shards, "
        f"{found['samples']:,} samples, {found['model']}, batch {found['global_batch_size']:,}",
        f"{'':46}{'found':>12}{'wanted':>12}",
        _row("manifest", f"{found['data']['manifest_bytes'] / 1e6:.1f} MB"),
    ]
    for name, worst in found["data"].items():
        if name.startswith("lanes_"):
            lines += _data_rows(name.removeprefix("lanes_"), worst)
    for name, each in found["checkpoints"].items():
        lines += _checkpoint_rows(name, each)
    goodput = found["simulated_goodput"]
    lines += [
        _row("time between failures", f"{found['seconds_between_failures'] / 3600:.1f} h"),
        _row("from a failure to the first new step", f"{found['resume_seconds']:.0f} s"),
        _row(f"a save every {found['every_steps']:,} steps", f"{found['interval_seconds']:.0f} s"),
        _row("  written in", f"{found['write_seconds']:.2f} s"),
        _row("goodput by formula", f"{found['goodput']:.2%}"),
        _row(
            "  in 20 simulated runs of 90 days",
            f"{goodput['mean']:.2%}",
            ">= 99%",
            met=goodput["min"] >= _WANTED_GOODPUT,
        ),
        _row("  the worst of them", f"{goodput['min']:.2%}"),
    ]
    return "\n".join(lines)


def _data_rows(lanes: str, worst: dict[str, float]) -> list[str]:
    seconds = worst["manifest_seconds"] + worst["first_slice_seconds"]
    return [
        _row(
            f"a rank's first slice, lanes: {lanes}",
            f"{seconds:.2f} s",
            "< 1 s",
            met=seconds < _WANTED_SECONDS,
        ),
        _row("  of which the manifest", f"{worst['manifest_seconds']:.2f} s"),
        _row("  each further step's slice", f"{worst['slice_seconds'] * 1e3:.2f} ms"),
        _row("  what its node's cache needs next", f"{worst['ahead_seconds'] * 1e3:.0f} ms"),
        _row(
            "  memory",
            f"{worst['peak_bytes'] / 1e6:.0f} MB",
            "< 200 MB",
            met=worst["peak_bytes"] < _WANTED_BYTES,
        ),
    ]


def _checkpoint_rows(name: str, each: dict[str, float]) -> list[str]:
    stored = f"{each['least_stored'] / 1e6:.1f} to {each['most_stored'] / 1e6:.1f} MB"
    return [
        _row(f"checkpoint, {name}: pieces", f"{each['pieces']:,}"),
        _row("  who stores what, once", f"{each['share_out_seconds']:.2f} s"),
        _row("  a rank's file", stored),
        _row("  index", f"{each['index_bytes'] / 1e6:.1f} MB"),
        _row("  index made (by rank 0, beside the steps)", f"{each['index_seconds']:.2f} s"),
        _row("  index read and verified", f"{each['open_seconds']:.2f} s"),
    ]


def _row(name: str, found: str, wanted: str = "", *, met: bool = True) -> str:
    verdict = "" if not wanted else "  met" if met else "  MISSED"
    return f"{name:42}{found:>16}{wanted:>12}{verdict}"
