"""Measure how fast an experiment's network samples, by the code that `dtr-scale sample` runs."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World, join_world
from dtr_scale.errors import ConfigError
from dtr_scale.evaluation.precision import one_thread, products_in, resolve_precision
from dtr_scale.evaluation.sampling import Sampler
from dtr_scale.jobs.bench.peer import Peer, build_peer
from dtr_scale.jobs.bench.report import config, machine, memory_peak_bytes
from dtr_scale.jobs.bench.timing import Alternating, LoopClock, matmul_seconds, spread
from dtr_scale.jobs.build import build_network
from dtr_scale.jobs.conditions import Wanted, conditions_of
from dtr_scale.jobs.plan.compute import plan_compute
from dtr_scale.jobs.sampling import build_sampler
from dtr_scale.logs import ProgressBar


def bench_sample(
    experiment: Experiment, *, num_samples: int, peer: Path | None = None
) -> dict[str, Any] | None:
    """Return the report of drawing samples of an untrained network, on rank 0; None on the others.

    Batches are of `evaluation.batch_size`, or `num_samples` where that is less, and as many as give
    at least so many samples. Under a launcher all ranks draw. With `peer`, a checkout of the
    released code, one of its steps follows each of ours.
    """
    world = join_world(needs_process_group=False, device=experiment.engine.device)
    with world.agree():
        measurement = _Measurement(experiment, world, num_samples)
        if peer:
            measurement.alternate_with(build_peer(peer, experiment, world))
    precision = resolve_precision(experiment.evaluation.precision, world.device)
    with products_in(precision, world.device), one_thread(world.device):
        report = measurement.run()
    world.leave()
    return report if world.is_main else None


class _Measurement:
    def __init__(self, experiment: Experiment, world: World, num_samples: int) -> None:
        self._experiment = experiment
        self._world = world
        self._batch_size = min(experiment.evaluation.batch_size, num_samples)
        self._batches = range(-(-num_samples // self._batch_size))[world.rank :: world.world_size]
        self._precision = resolve_precision(experiment.evaluation.precision, world.device)
        network = build_network(experiment).to(world.device).eval()
        _draw_zeros(network)
        self._evaluations = 0
        self._clock = LoopClock(world.device)
        self._theirs: Alternating | None = None
        network.register_forward_pre_hook(self._count)
        conditions = conditions_of(experiment, Wanted(), world.device)
        self._sampler: Sampler = build_sampler(
            experiment,
            network,
            world.device,
            conditions=conditions.of_samples,
            null_condition=conditions.null,
            step=0,
        )

    def alternate_with(self, peer: Peer) -> None:
        if self._experiment.evaluation.cfg_interval:
            raise ConfigError(
                "--peer: the released code guides at every timestep; leave "
                "evaluation.cfg_interval out"
            )
        _draw_zeros(peer.network)
        step = peer.sampling_step(self._precision, self._batch_size)
        self._theirs = Alternating(self._clock, self._world.device, step)

    def _count(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        self._evaluations += len(args[0])

    def run(self) -> dict[str, Any]:
        began = time.perf_counter()
        self._warm_up()
        warm_up_seconds = time.perf_counter() - began
        matmul_flops, matmuls = self._matmul()
        self._evaluations = 0
        self._clock.begin_round()
        total = len(self._batches) * self._sampler.num_steps
        with ProgressBar("sampling steps", total, shown=self._world.is_main) as bar:
            for batch in self._batches:
                self._draw(batch, partial(self._timed, bar))
                self._clock.end_round()  # from the last step to the samples on the CPU
        matmuls += self._matmul()[1]
        peak = matmul_flops / spread(matmuls).median
        return self._report(peak) | {"warm_up_seconds": warm_up_seconds}

    def _timed(self, bar: ProgressBar, steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            yield step
            self._clock.end_round()
            bar.advance()
            if self._theirs:
                self._theirs.make_step()

    def _draw(self, batch: int, progress: Callable[[Iterable[int]], Iterable[int]]) -> None:
        first = batch * self._batch_size
        self._sampler.draw(range(first, first + self._batch_size), progress)

    def _warm_up(self) -> None:
        """Take two steps, or where guidance begins in mid-way all of them: each batch's shape."""
        count = self._sampler.num_steps if self._experiment.evaluation.cfg_interval else 2
        self._draw(0, lambda steps: itertools.islice(steps, count))

    def _matmul(self) -> tuple[float, list[float]]:
        return matmul_seconds(self._world.device, self._precision)

    def _report(self, peak: float) -> dict[str, Any]:
        """Return the figures; a collective, since each rank has some."""
        world, steps, rounds = self._world, self._sampler.num_steps, self._clock.rounds()
        # A rank may have had no batch. The others' rates add up.
        rates = world.all_gather_object(self._evaluations / sum(rounds) if rounds else 0.0)
        samples = world.all_gather_object(len(self._batches) * self._batch_size)
        evaluations = sum(world.all_gather_object(self._evaluations))
        peak = sum(world.all_gather_object(peak))
        memory = memory_peak_bytes(world)
        flops = sum(rates) * 2 * plan_compute(self._experiment).forward.total.macs
        # Of a batch's rounds the last is none of a step.
        of_steps = [seconds for i, seconds in enumerate(rounds) if i % (steps + 1) < steps]
        return {
            "bench": "sample",
            "network_evaluations_per_second": sum(rates),
            "samples_per_second": sum(rates) * sum(samples) / evaluations,
            "mfu": flops / peak,
            "model_flops_per_second": flops,
            "matmul_flops_per_second": peak,
            **self._beside(of_steps),
            "memory_peak_bytes": memory,
            "network_evaluations": evaluations,
            "samples": sum(samples),
            "batch_size": self._batch_size,
            "sampling_steps": steps,
            "precision": self._precision,
            "step_seconds": spread(of_steps)._asdict(),
            "machine": machine(world),
            "config": config(self._experiment),
        }

    def _beside(self, ours: list[float]) -> dict[str, float | None]:
        """Return the rate of the released sampler, and ours over it: by the median steps."""
        rate = ratio = None
        if self._theirs:
            # The first allocates.
            theirs = spread(self._theirs.rounds()[1:]).median
            halves = 1 if self._experiment.evaluation.cfg_scale == 1 else 2
            rate, ratio = halves * self._batch_size / theirs, theirs / spread(ours).median
        return {"peer_network_evaluations_per_second": rate, "speed_over_peer": ratio}


@torch.no_grad()
def _draw_zeros(network: nn.Module) -> None:
    """Replace the zeros that a network begins with, whose products take less power."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
