"""Tell at the start of a job what trains, on what, where it writes, and how to stop it."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dtr_scale.config.schema import Experiment
from dtr_scale.evaluation.flops import LayerCost
from dtr_scale.jobs.description import engine_name
from dtr_scale.jobs.drawing import device_name
from dtr_scale.launchers import local_world_size
from dtr_scale.train.trainer import Trainer

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where an experiment runs, and how far it is."""

    hosts: Sequence[str]
    """Of each rank."""
    device: str
    """A GPU's name, or "cpu"."""
    micro_batch_size: int
    num_samples: int
    samples_seen: int
    is_compiled: bool

    @property
    def world_size(self) -> int:
        return len(self.hosts)


def place_of(trainer: Trainer, hosts: Sequence[str]) -> Place:
    """Return where a trainer stands."""
    loader = trainer.loader
    return Place(
        hosts=hosts,
        device=device_name(trainer.world.device),
        micro_batch_size=loader.places.shape[1],
        num_samples=sum(loader.samples.shard_samples),
        samples_seen=trainer.state.samples_seen,
        is_compiled=trainer.is_compiled,
    )


def tell_start(experiment: Experiment, place: Place, cost: LayerCost | None) -> None:
    """Log the banner, a line for each thing."""
    for line in banner(experiment, place, cost):
        log.info("%s", line)
    if place.is_compiled:
        log.info("compiling: the first step takes about a minute")


def banner(experiment: Experiment, place: Place, cost: LayerCost | None) -> list[str]:
    """Return what is about to run; `cost` is of a sample's forward, if it could be counted."""
    model, run_dir = experiment.model, experiment.run_path
    size = ""
    if cost:
        size = f", {short(cost.num_parameters)} parameters, {short(cost.macs)} MACs a forward"
    how = "compiled" if place.is_compiled else "not compiled"
    parts = {
        "network": f"{model.title}{size}; routing {model.routing.type}, "
        f"objective {experiment.objective.type}",
        "device": _device(place),
        "engine": f"{engine_name(experiment)}, {experiment.engine.precision}, {how}",
        "data": _data(experiment, place),
        "batch": _batch(experiment, place),
        "run": f"{run_dir}, its log is {run_dir / 'journal.jsonl'}",
        "stop": "Ctrl-C saves; the same command goes on",
    }
    return [f"{name:8} {told}" for name, told in parts.items()]


def short(number: float) -> str:
    """Return a number with four digits and a letter.

    >>> short(458_100_000), short(49_990), short(7)
    ('458.1M', '49.99K', '7')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def _device(place: Place) -> str:
    hosts = Counter(place.hosts)
    told = f"{place.world_size} x {place.device}" if place.world_size > 1 else place.device
    if place.device == "cpu":
        threads = torch.get_num_threads()
        told += f", {threads} thread{'s' if threads > 1 else ''}"
        told += " each" if place.world_size > 1 else ""
    names = ", ".join(list(hosts)[:3]) + (", ..." if len(hosts) > 3 else "")
    return f"{told}, on {len(hosts)} hosts ({names})" if len(hosts) > 1 else f"{told}, on {names}"


def _data(experiment: Experiment, place: Place) -> str:
    data, model, train = experiment.data, experiment.model, experiment.train
    given = {"class": f", {model.num_classes:,} classes", "text": ", with texts"}
    steps = train.max_steps - place.samples_seen // train.global_batch_size
    epochs = max(0, steps) * train.global_batch_size / max(1, place.num_samples)
    told = (
        f"{data.shards or data.type}: {place.num_samples:,} samples"
        f"{given.get(model.conditioning, '')}; {_epochs(epochs)} epochs to come"
    )
    cores = len(os.sched_getaffinity(0))
    workers = data.num_workers * local_world_size()
    # Instead of torch's warning of the same, which comes twice and from each rank.
    return told + (f"; {workers} workers on {cores} cores" if workers > cores else "")


def _epochs(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _batch(experiment: Experiment, place: Place) -> str:
    batch, micro = experiment.train.global_batch_size, place.micro_batch_size
    accumulation = batch // (micro * place.world_size)
    return (
        f"{batch} = micro-batch {micro} x accumulation {accumulation} x {place.world_size} "
        f"rank{'s' if place.world_size > 1 else ''}"
    )
