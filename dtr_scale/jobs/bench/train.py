"""Measure an experiment's training step: how fast it is, how near the device's peak, and why."""

import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.jobs.attention import settle_attention
from dtr_scale.jobs.bench.peer import Peer, build_peer
from dtr_scale.jobs.bench.place import temporary_folder
from dtr_scale.jobs.bench.report import config, machine, memory_peak_bytes
from dtr_scale.jobs.bench.timing import Alternating, LoopClock, matmul_seconds, spread
from dtr_scale.jobs.build import build_trainer
from dtr_scale.jobs.plan.compute import plan_compute
from dtr_scale.jobs.plan.gpus import nominal_flops
from dtr_scale.jobs.train import join
from dtr_scale.logs import ProgressBar
from dtr_scale.signals import LeaveRequest
from dtr_scale.tracking.journal import Record
from dtr_scale.train.trainer import Trainer

log = logging.getLogger(__name__)

_PROFILED_STEPS = 2


def bench_train(
    experiment: Experiment,
    *,
    steps: int,
    warm_up: int,
    place: str | None = None,
    peer: Path | None = None,
) -> dict[str, Any] | None:
    """Return the report of so many steps of an experiment, on rank 0; None on the others.

    The real trainer makes them on the experiment's own data, then saves once to a folder below
    `place`, which is removed. `warm_up` steps come before, in which torch compiles and allocates.
    With `peer`, a checkout of the released code, one of its steps follows each of ours.
    """
    began = time.perf_counter()
    world = join(experiment)
    with temporary_folder(place, world) as folder:
        # The last steps are watched by torch's profiler, which takes time itself.
        profiled = _PROFILED_STEPS if world.world_size > 1 else 0
        total = warm_up + steps + profiled
        trainer = build_trainer(_only_steps(experiment, total, folder.url), world)
        trainer.checkpoints.check_folder()
        settle_attention(trainer, experiment, stored=None)
        build_seconds = time.perf_counter() - began
        measurement = _Measurement(trainer, world, experiment, steps=steps, warm_up=warm_up)
        if peer:
            measurement.alternate_with(build_peer(peer, experiment, world))
        measurement.run()
        report = measurement.report() | {"build_seconds": build_seconds}
    world.leave()
    return report if world.is_main else None


def _only_steps(experiment: Experiment, max_steps: int, checkpoints: str) -> Experiment:
    """Return an experiment that trains so long, saves at its end alone, and evaluates nothing."""
    sections = {
        "train": {"max_steps": max_steps, "log_every": 1, "max_minutes": None},
        "checkpoint": {"dir": checkpoints, "every_steps": max_steps},
        "evaluation": {"every_steps": 0},
    }
    return experiment.model_copy(
        update={
            name: getattr(experiment, name).model_copy(update=keys)
            for name, keys in sections.items()
        }
    )


class _Measurement:
    """Watches a trainer from outside: the calls of its parts, and the records that it logs."""

    def __init__(
        self, trainer: Trainer, world: World, experiment: Experiment, *, steps: int, warm_up: int
    ) -> None:
        self._trainer = trainer
        self._world = world
        self._experiment = experiment
        self._measured = range(warm_up, warm_up + steps)
        self._records: list[Record] = []
        self._collectives: float | None = None
        self._memory = 0
        self._matmuls: list[float] = []
        self._clock = LoopClock(world.device)
        # The host's time: a GPU may go on meanwhile, but has been given nothing more to do.
        self._stalls = LoopClock(torch.device("cpu"))
        self._theirs: Alternating | None = None

    def alternate_with(self, peer: Peer) -> None:
        step = peer.training_step(self._experiment.engine.precision, self._batch_size)
        self._theirs = Alternating(self._clock, self._world.device, step)

    def run(self) -> None:
        self._measure_matmul()
        self._watch()
        trainer = self._trainer
        if trainer.is_compiled and self._world.is_main:
            log.info("compiling: the first step takes about a minute")
        self._clock.begin_round()
        with ProgressBar("steps", trainer.max_steps, shown=self._world.is_main) as bar:
            trainer.run(
                LeaveRequest(),
                log=self._log,
                evaluate=lambda step: None,
                on_step=lambda step, seconds: bar.advance(),
            )
        trainer.loader.close()
        # After the steps, too: on a machine that others use both see the same.
        self._measure_matmul()
        trainer.checkpoints.close()

    def _watch(self) -> None:
        """Time the parts of all further steps, each of which ends when the position moves on."""
        engine, state, clock = self._trainer.engine, self._trainer.state, self._clock
        # On these objects alone, whose classes stay as they are.
        for name in self._engine_parts:
            setattr(engine, name, clock.timed(name, getattr(engine, name)))
        # `flat`, compiled, averages in the pass of the update.
        engine.step = clock.timed("step", engine.step)
        engine.average = clock.timed("ema", engine.average)
        self._trainer.save = self._stalls.timed("save", self._trainer.save)
        advance = state.advance

        def end_step(num_samples: int) -> None:
            advance(num_samples)
            clock.end_round()
            if self._theirs:
                self._theirs.make_step()
            if state.step == self._measured.stop:
                self._memory = memory_peak_bytes(self._world)
                self._start_profile()

        state.advance = end_step

    def _measure_matmul(self) -> None:
        self._world.barrier()  # all ranks at once, as in training
        precision = self._experiment.engine.precision
        self._matmul_flops, seconds = matmul_seconds(self._world.device, precision)
        self._matmuls += seconds

    def _start_profile(self) -> None:
        if self._world.world_size > 1:
            on_gpu = self._world.device.type == "cuda"
            self._profile = profile(
                activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
            )
            self._profile.start()

    def _log(self, record: Record) -> None:
        self._records.append(record)
        if self._world.world_size > 1 and len(self._records) == self._trainer.max_steps:
            self._profile.stop()
            events = self._profile.events() or ()
            self._collectives = _collective_seconds(events) / _PROFILED_STEPS

    def report(self) -> dict[str, Any]:
        """Return the figures; a collective, since each rank has some."""
        experiment, world = self._experiment, self._world
        chosen = slice(self._measured.start, self._measured.stop)
        rounds = self._clock.rounds()
        step = spread(rounds[chosen])
        batch_size = experiment.train.global_batch_size
        rate = batch_size / step.median
        flops = rate * plan_compute(experiment).training_flops_per_image
        peak = sum(world.all_gather_object(self._matmul_flops / spread(self._matmuls).median))
        nominal = nominal_flops(world.device, experiment.engine.precision)
        their_rate = None
        if self._theirs:
            their_rate = batch_size / spread(self._theirs.rounds()[chosen]).median
        (stall,) = self._stalls.parts("save")
        return {
            "bench": "train",
            "samples_per_second": rate,
            "mfu": flops / peak,
            "mfu_nominal": flops / (nominal * world.world_size) if nominal else None,
            "model_flops_per_second": flops,
            "matmul_flops_per_second": peak,
            "peer_samples_per_second": their_rate,
            "speed_over_peer": rate / their_rate if their_rate else None,
            "memory_peak_bytes": self._memory,
            "steps": len(self._measured),
            "global_batch_size": batch_size,
            "step_seconds": step._asdict(),
            "parts": self._parts(rounds[chosen], chosen),
            "collective_seconds": self._collectives,
            "save_stall_seconds": stall,
            "save_stall_share": stall / (experiment.checkpoint.every_steps * step.median),
            "warm_up_steps": self._measured.start,
            "first_step_seconds": rounds[0],
            "machine": machine(world),
            "config": config(experiment),
        }

    def _parts(self, rounds: list[float], chosen: slice) -> dict[str, dict[str, float]]:
        waits = [
            record["data_wait_fraction"] / record["samples_per_second"] * self._batch_size
            for record in self._records
        ]
        step, ema = (self._clock.parts(name)[chosen] for name in ("step", "ema"))
        seconds = {
            "data_wait": waits[chosen],
            **{name: self._clock.parts(name)[chosen] for name in self._engine_parts},
            "update": [whole - part for whole, part in zip(step, ema, strict=True)],
            "ema": ema,
        }
        seconds["rest"] = [
            whole - sum(known) for whole, *known in zip(rounds, *seconds.values(), strict=True)
        ]
        return {
            name: {**spread(each)._asdict(), "share": sum(each) / sum(rounds)}
            for name, each in seconds.items()
        }

    @property
    def _engine_parts(self) -> tuple[str, ...]:
        # A CUDA graph is one launch of both.
        has_graphs = self._experiment.engine.cuda_graphs is True
        return ("accumulate",) if has_graphs else ("forward", "backward")

    @property
    def _batch_size(self) -> int:
        return self._experiment.train.global_batch_size


def _collective_seconds(events: Iterable[Any]) -> float:
    """Return how long the collectives among a profile's events were under way, in seconds."""
    # NCCL's kernels on a GPU; on a CPU what gloo's threads record.
    ours = [event for event in events if re.match(r"ncclDevKernel|ncclKernel|gloo:", event.name)]
    return sum(event.time_range.elapsed_us() for event in ours) / 1e6
