"""Estimate an experiment's memory and speed on a cluster, under its engine and the others."""

import math
from dataclasses import replace
from functools import cached_property

from dtr_scale.config.schema import Experiment
from dtr_scale.jobs.plan.cluster import Cluster
from dtr_scale.jobs.plan.layout import Layout, layout_of
from dtr_scale.jobs.plan.memory import (
    FRAGMENTATION,
    Memory,
    Sizes,
    activation_bytes,
    rank_memory,
)
from dtr_scale.jobs.plan.roofline import Seconds, forward_and_backward, vae_seconds
from dtr_scale.jobs.plan.step_time import StepTime, step_time
from dtr_scale.jobs.plan.trace import Trace, trace_step


class Planner:
    """What one experiment needs of one cluster.

    `factor` is by how much computation is slower there than the roofline says, as a measurement
    tells. `as_released`: the released code's way, which is DDP in TF32, not compiled, with the
    autoencoder in the loop.
    """

    def __init__(
        self,
        experiment: Experiment,
        cluster: Cluster,
        *,
        factor: float = 1.0,
        as_released: bool = False,
    ) -> None:
        self.experiment = experiment
        self.cluster = cluster
        self.factor = factor
        self.as_released = as_released
        self._traces: dict[tuple[str, bool, int], Trace] = {}

    @property
    def rank_batch_size(self) -> int:
        return self.experiment.train.global_batch_size // self.cluster.world_size

    @cached_property
    def micro_batch_size(self) -> int:
        # The released code has no gradient accumulation.
        if self.as_released:
            return self.rank_batch_size
        return self.experiment.micro_batch_size(self.cluster.world_size)

    @cached_property
    def checkpointing(self) -> bool:
        return self.experiment.engine.activation_checkpointing and not self.as_released

    @cached_property
    def sizes(self) -> Sizes:
        train, trace = self.experiment.train, self._trace("bf16", False, self.micro_batch_size)
        return Sizes(
            parameters=trace.num_parameters,
            trained=trace.num_trained,
            largest_block=max(trace.block_parameters, default=trace.num_parameters),
            outside_blocks=trace.num_parameters - sum(trace.block_parameters),
            averages=1 + len(train.ema_decays) + len(train.ema_sigma_rel),
        )

    def layout(self, name: str | None = None, micro_batch_size: int | None = None) -> Layout:
        """Return the layout of the experiment's engine, or of another one."""
        ranks = self.cluster.world_size
        if self.as_released:
            return Layout("ddp", ranks, ranks, "fp32")
        layout = layout_of(self.experiment, ranks, self.sizes.parameters, name)
        micro = micro_batch_size or self.micro_batch_size
        return replace(layout, grad_accum_steps=self.rank_batch_size // micro)

    def compiles(self, layout: Layout) -> bool:
        wanted = self.experiment.engine.compile is not False
        return wanted and layout.compiles and not self.as_released

    def memory(self, layout: Layout, *, checkpointing: bool | None = None) -> Memory:
        """Return the memory of a rank at the layout's micro-batch."""
        micro = self.rank_batch_size // layout.grad_accum_steps
        activations = micro * self.activation_bytes(layout, checkpointing=checkpointing)
        wanted = self.checkpointing if checkpointing is None else checkpointing
        trace = self._trace(layout.computes_in, wanted, self.micro_batch_size)
        return rank_memory(layout, self.sizes, activations, trace)

    def activation_bytes(self, layout: Layout, *, checkpointing: bool | None = None) -> float:
        """Return the bytes that each sample of a micro-batch takes."""
        # Of the micro-batch that is traced anyway: they grow linearly.
        precision, micro = layout.computes_in, self.micro_batch_size
        wanted = self.checkpointing if checkpointing is None else checkpointing
        trace = self._trace(precision, False, micro)
        recomputed = self._trace(precision, True, micro) if wanted else None
        return activation_bytes(trace, recomputed, compiled=self.compiles(layout)) / micro

    def largest_micro_batch(
        self, name: str | None = None, *, checkpointing: bool | None = None
    ) -> int:
        """Return the most samples at a time that fit, also beyond a rank's share; 0 if none do."""
        layout = self.layout(name)
        most = self._most_samples(layout, checkpointing)
        # Fewer than a rank's share accumulate: gradients are there while activations peak.
        if most < self.rank_batch_size and layout.grad_accum_steps == 1:
            most = self._most_samples(replace(layout, grad_accum_steps=2), checkpointing)
        return most

    def _most_samples(self, layout: Layout, checkpointing: bool | None) -> int:
        room = (
            self.cluster.gpu.memory_bytes - self.memory(layout, checkpointing=checkpointing).total
        )
        per_sample = FRAGMENTATION * self.activation_bytes(layout, checkpointing=checkpointing)
        micro = self.rank_batch_size // layout.grad_accum_steps
        return max(0, micro + math.floor(room / per_sample))

    def fits(self, memory: Memory) -> bool:
        return memory.total <= self.cluster.gpu.memory_bytes

    def micro_step(
        self, layout: Layout, *, checkpointing: bool | None = None
    ) -> tuple[Seconds, Seconds]:
        """Return the roofline of a micro-step's forward and backward."""
        precision = layout.computes_in
        wanted = self.checkpointing if checkpointing is None else checkpointing
        micro = self.rank_batch_size // layout.grad_accum_steps
        trace = self._trace(precision, wanted, micro)
        precision = "fp32" if precision == "fp32" else "bf16"
        compiled = self.compiles(layout)
        return forward_and_backward(trace, self.cluster.gpu, precision=precision, compiled=compiled)

    def step(self, layout: Layout, *, checkpointing: bool | None = None) -> StepTime:
        """Return the time of a step."""
        vae = 0.0
        if self.as_released:
            vae = vae_seconds(self.cluster.gpu, self.rank_batch_size, "fp32")
        return step_time(
            layout,
            self.sizes,
            self.cluster,
            self.micro_step(layout, checkpointing=checkpointing),
            factor=self.factor,
            vae=vae,
        )

    def _trace(self, precision: str, checkpointing: bool, micro_batch_size: int) -> Trace:
        key = (precision, checkpointing, micro_batch_size)
        if key not in self._traces:
            self._traces[key] = trace_step(
                self.experiment,
                micro_batch_size,
                precision=precision,
                checkpointing=checkpointing,
            )
        return self._traces[key]
