"""Tell what a run will take before it begins: memory, time, money, failures, storage."""

from dataclasses import asdict, dataclass
from typing import Any

from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.plan.cluster import Cluster
from dtr_scale.jobs.plan.compute import ComputePlan, plan_compute
from dtr_scale.jobs.plan.goodput import (
    GPU_HOURS_PER_FAILURE,
    Failures,
    rounded_steps,
    seconds_between_failures,
)
from dtr_scale.jobs.plan.gpus import GB
from dtr_scale.jobs.plan.layout import ENGINES, Layout
from dtr_scale.jobs.plan.memory import Memory, checkpoint_bytes, snapshot_bytes
from dtr_scale.jobs.plan.planner import Planner
from dtr_scale.jobs.plan.step_time import StepTime
from dtr_scale.jobs.plan.storage import Storage, storage_of

_HOST_LINK = 20e9
"""Bytes a second from a GPU to page-locked host memory, over PCIe 4: assumed."""
_NOTICE_AND_START = 90.0
"""Seconds from a failure to loading: noticed, started anew, imported and compiled from a cache."""
_PROBE = 0.5
"""Of a step: what is computed for a checkpoint, and the wait for the step's figures."""


@dataclass(frozen=True)
class Terms:
    """What a plan is told of money, failures and disks."""

    price: float | None = None
    """Of a GPU and hour."""
    gpu_hours_per_failure: float = GPU_HOURS_PER_FAILURE
    storage_gb: float = 1.0
    """Written or read by a node in a second."""


@dataclass(frozen=True)
class EnginePlan:
    """One engine: what a rank holds, the most that fits, and the step at the given micro-batch."""

    layout: Layout
    memory: Memory
    fits: bool
    largest_micro_batch: int
    step: StepTime


@dataclass(frozen=True)
class RunPlan:
    """All of it."""

    experiment: Experiment
    cluster: Cluster
    terms: Terms
    compute: ComputePlan
    planner: Planner
    chosen: EnginePlan
    engines: list[EnginePlan]
    activations: dict[bool, float]
    """Bytes at the micro-batch, by whether they are computed again (activation checkpointing)."""
    snapshot: float
    failures: Failures
    storage: Storage

    @property
    def seconds(self) -> float:
        """Of all steps, without failures."""
        return self.chosen.step.total * self.experiment.train.max_steps

    @property
    def interval_steps(self) -> int:
        """Steps between checkpoints for the best goodput, a tenth of the run at most."""
        steps = rounded_steps(self.failures.best_interval() / self.chosen.step.total)
        return max(1, min(steps, self.experiment.train.max_steps // 10))

    def goodput(self, every_steps: int) -> float:
        return self.failures.goodput(every_steps * self.chosen.step.total)

    @property
    def wall_seconds(self) -> float:
        """With failures, at the experiment's own interval; endless where nothing would count."""
        goodput = self.goodput(self.experiment.checkpoint.every_steps)
        return self.seconds / goodput if goodput else float("inf")

    @property
    def gpu_hours(self) -> float:
        return self.wall_seconds * self.cluster.world_size / 3600

    @property
    def cost(self) -> float | None:
        return None if self.terms.price is None else self.terms.price * self.gpu_hours

    @property
    def flops_per_gpu(self) -> float:
        """Model FLOP/s, without what is recomputed."""
        images = self.experiment.train.global_batch_size / self.cluster.world_size
        return images * self.compute.training_flops_per_image / self.chosen.step.total

    def figures(self) -> dict[str, Any]:
        """Return the plan as plain JSON data, in bytes and seconds."""
        step = self.chosen.step
        every = self.experiment.checkpoint.every_steps
        return {
            **self.compute.figures(per_layer=False),
            "gpu": asdict(self.cluster.gpu),
            "gpus": self.cluster.gpus,
            "nodes": self.cluster.nodes,
            "micro_batch_size": self.planner.micro_batch_size,
            "grad_accum_steps": self.chosen.layout.grad_accum_steps,
            "engine": self.chosen.layout.name,
            "engines": {each.layout.name: _engine_figures(each) for each in self.engines},
            "activation_bytes": {
                "kept": self.activations[False],
                "computed_again": self.activations[True],
            },
            "step": {**asdict(step), "total": step.total},
            "steps_per_second": 1 / step.total,
            "samples_per_second": self.experiment.train.global_batch_size / step.total,
            "model_flops_per_second_and_gpu": self.flops_per_gpu,
            "seconds_without_failures": self.seconds,
            "seconds": self.wall_seconds,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "failures": asdict(self.failures),
            "goodput": self.goodput(every),
            "best_every_steps": self.interval_steps,
            "best_goodput": self.goodput(self.interval_steps),
            "snapshot_bytes_of_a_node": self.snapshot,
            "storage": {**asdict(self.storage), "checkpoints": self.storage.checkpoints},
        }


def _engine_figures(plan: EnginePlan) -> dict[str, Any]:
    return {
        "memory": {**asdict(plan.memory), "total": plan.memory.total},
        "fits": plan.fits,
        "largest_micro_batch": plan.largest_micro_batch,
        "step_seconds": plan.step.total,
    }


def plan_run(
    experiment: Experiment,
    cluster: Cluster,
    terms: Terms,
    *,
    factor: float = 1.0,
    as_released: bool = False,
) -> RunPlan:
    """Return the plan of a run; ConfigError if it cannot run on so many ranks."""
    if experiment.engine.type == "single" and cluster.world_size > 1 and not as_released:
        raise ConfigError(
            f"engine.type = 'single' runs in one process, --gpus and --nodes make "
            f"{cluster.world_size} (--gpus is 8 unless given); add --engine.type=flat, or plan "
            "with --gpus=1"
        )
    experiment.micro_batch_size(cluster.world_size)  # raises for a batch that ranks cannot share
    planner = Planner(experiment, cluster, factor=factor, as_released=as_released)
    chosen = _engine_plan(planner, None)
    names = [name for name in ENGINES if name != "single" or cluster.world_size == 1]
    if as_released:
        names = []
    others = [_engine_plan(planner, name) for name in names if name != chosen.layout.name]
    engines = sorted([chosen, *others], key=lambda each: _place(each.layout.name))
    micro = planner.micro_batch_size
    return RunPlan(
        experiment=experiment,
        cluster=cluster,
        terms=terms,
        compute=plan_compute(experiment),
        planner=planner,
        chosen=chosen,
        engines=engines,
        activations={
            again: micro * planner.activation_bytes(chosen.layout, checkpointing=again)
            for again in (False, True)
        },
        snapshot=snapshot_bytes(chosen.layout, planner.sizes, ranks=cluster.gpus),
        failures=_failures(planner, chosen, terms),
        storage=storage_of(
            experiment,
            checkpoint_bytes(planner.sizes),
            ranks=cluster.gpus,
            micro_batch_size=micro,
        ),
    )


def _place(name: str) -> int:
    return ENGINES.index(name) if name in ENGINES else -1


def _engine_plan(planner: Planner, name: str | None) -> EnginePlan:
    layout = planner.layout(name)
    memory = planner.memory(layout)
    return EnginePlan(
        layout=layout,
        memory=memory,
        fits=planner.fits(memory),
        largest_micro_batch=planner.largest_micro_batch(name),
        step=planner.step(layout),
    )


def _failures(planner: Planner, chosen: EnginePlan, terms: Terms) -> Failures:
    cluster, step = planner.cluster, chosen.step
    stored = checkpoint_bytes(planner.sizes)
    per_node = stored / cluster.nodes / (terms.storage_gb * GB)
    # The copy runs beside the next forward and backward.
    copied = stored / cluster.world_size / _HOST_LINK
    stall = max(0.0, copied - step.forward - step.backward) + _PROBE * step.total
    return Failures(
        seconds_between=seconds_between_failures(terms.gpu_hours_per_failure, cluster.world_size),
        restart_seconds=_NOTICE_AND_START + per_node,
        stall_seconds=stall,
        write_seconds=per_node,
    )
