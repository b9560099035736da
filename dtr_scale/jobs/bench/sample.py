"""Measure how fast an experiment's network samples, by the code that `dtr-scale sample` runs."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World, join_world
from dtr_scale.evaluation.precision import one_thread, products_in, resolve_precision
from dtr_scale.evaluation.sampling import Sampler
from dtr_scale.jobs.bench.report import config, machine, memory_peak_bytes
from dtr_scale.jobs.bench.timing import LoopClock, matmul_seconds, spread
from dtr_scale.jobs.build import build_network
from dtr_scale.jobs.conditions import conditions_of
from dtr_scale.jobs.plan import plan_compute
from dtr_scale.jobs.sampling import build_sampler
from dtr_scale.models.denoiser import Denoiser


def bench_sample(experiment: Experiment, *, num_samples: int) -> dict[str, Any] | None:
    """Return the report of drawing samples of an untrained network, on rank 0; None on the others.

    Batches are of `evaluation.batch_size`, or `num_samples` where that is less, and as many as give
    at least so many samples. Under a launcher all ranks draw.
    """
    world = join_world(needs_process_group=False, device=experiment.engine.device)
    with world.agree():
        measurement = _Measurement(experiment, world, num_samples)
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
        network = _drawn(build_network(experiment)).to(world.device).eval()
        self._evaluations = 0
        network.register_forward_pre_hook(self._count)
        conditions = conditions_of(experiment, None, world.device)
        self._sampler: Sampler = build_sampler(
            experiment,
            network,
            world.device,
            conditions=conditions.of_samples,
            null_condition=conditions.null,
            step=0,
        )

    def _count(self, network: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self._evaluations += len(args[0])

    def run(self) -> dict[str, Any]:
        began = time.perf_counter()
        self._warm_up()
        warm_up_seconds = time.perf_counter() - began
        matmul_flops, matmuls = self._matmul()
        self._evaluations = 0
        clock = LoopClock(self._world.device)
        for batch in self._batches:
            self._draw(batch, _each(clock.end_round))
            clock.end_round()  # from the last step to the samples on the CPU
        matmuls += self._matmul()[1]
        return self._report(clock.rounds(), matmul_flops / spread(matmuls).median) | {
            "warm_up_seconds": warm_up_seconds
        }

    def _draw(self, batch: int, progress: Callable[[Iterable[int]], Iterable[int]]) -> None:
        first = batch * self._batch_size
        self._sampler.draw(range(first, first + self._batch_size), progress)

    def _warm_up(self) -> None:
        """Take two steps, or where guidance begins in mid-way all of them: each batch's shape."""
        count = self._sampler.num_steps if self._experiment.evaluation.cfg_interval else 2
        self._draw(0, lambda steps: itertools.islice(steps, count))

    def _matmul(self) -> tuple[float, list[float]]:
        return matmul_seconds(self._world.device, self._precision)

    def _report(self, rounds: list[float], peak: float) -> dict[str, Any]:
        """Return the figures; a collective, since each rank has some."""
        world, steps = self._world, self._sampler.num_steps
        # A rank may have had no batch. The others' rates add up.
        rates = world.all_gather_object(self._evaluations / sum(rounds) if rounds else 0.0)
        samples = world.all_gather_object(len(self._batches) * self._batch_size)
        evaluations = sum(world.all_gather_object(self._evaluations))
        peak = sum(world.all_gather_object(peak))
        memory = memory_peak_bytes(world)
        flops = sum(rates) * 2 * plan_compute(self._experiment).forward.total.macs
        of_steps = [seconds for i, seconds in enumerate(rounds) if i % (steps + 1) < steps]
        return {
            "bench": "sample",
            "network_evaluations_per_second": sum(rates),
            "samples_per_second": sum(rates) * sum(samples) / evaluations,
            "mfu": flops / peak,
            "model_flops_per_second": flops,
            "matmul_flops_per_second": peak,
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


def _each(end_step: Callable[[], object]) -> Callable[[Iterable[int]], Iterator[int]]:
    """Return the `progress` of a sampler that calls `end_step` after each of its steps."""

    def progress(steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            yield step
            end_step()

    return progress


@torch.no_grad()
def _drawn(network: Denoiser) -> Denoiser:
    """Return a network without the zeros that it begins with, whose products take less power."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return network
