"""Trainings of the demo under any engine, and what may differ between them."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dtr_scale.engines.world import World, join_world
from dtr_scale.tracking.journal import Record
from tests.support.runs import demo_experiment, train_on

STEPS, HALF = 20, 10
COMMON = (
    "--train.global_batch_size=32",
    "--train.micro_batch_size=8",
    "--train.grad_clip=0.5",
    f"--train.max_steps={STEPS}",
)
HALF_WAY = f"--train.max_steps={HALF}"
ENGINES = {
    "single": ("--engine.type=single",),
    **{f"zero{k}": ("--engine.type=deepspeed", f"--engine.zero_stage={k}") for k in range(4)},
    "fsdp2": ("--engine.type=fsdp2",),
    "flat": ("--engine.type=flat",),
    "hsdp": ("--engine.type=fsdp2", "--engine.replicate=2"),
}
LONE = World(0, 0, 1, torch.device("cpu"))


def setting(name: str) -> tuple[str, ...]:
    """Return the overrides of an engine and its precision: zero3_bf16."""
    engine, _, precision = name.partition("_")
    return (*COMMON, *ENGINES[engine], f"--engine.precision={precision}")


class Job(NamedTuple):
    """One training: its name, the run's folder (jobs of one folder go on with each other)."""

    name: str
    overrides: tuple[str, ...]
    folder: str = ""
    resume: bool = False
    evaluating: bool = False


def train_all(digits: Path, place: Path, jobs: list[Job], world: World) -> dict[str, list[Record]]:
    records = {}
    for job in jobs:
        experiment = demo_experiment(digits, place / (job.folder or job.name), *job.overrides)
        records[job.name] = train_on(
            world, experiment, resume=job.resume, evaluating=job.evaluating
        )
    return records


def handed_over(before: str, after: str) -> list[Job]:
    """Return a training that one engine begins and another ends."""
    folder = f"{before}_then_{after}"
    return [
        Job(f"{folder}_begun", (*setting(before), HALF_WAY), folder),
        Job(folder, setting(after), folder, resume=True),
    ]


def train_on_ranks(digits: Path, place: Path, jobs: list[Job]) -> dict[str, list[Record]]:
    """Runs on each rank: all jobs, one after the other."""
    world = join_world(needs_process_group=True)
    records = train_all(digits, place, jobs, world)
    world.leave()
    return records


def losses(records: list[Record]) -> list[float]:
    return [record["loss"] for record in records]


def assert_same(found: list[Record], expected: list[Record], precision: str) -> None:
    """Every figure of every step, relative to the largest: single ones may be near 0."""
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for key in ("loss", "objective", "mse", "vb", "grad_norm"):
        values = [record[key] for record in expected]
        scale = max(abs(value) for value in values)
        same = pytest.approx(values, rel=tolerance, abs=tolerance * scale)
        assert [record[key] for record in found] == same, key
