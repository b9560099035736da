"""Break a supervised training at random, and measure how it comes back.

Its ranks run on this machine, or one on each of two hosts made of network namespaces. The journal
is compared with that of the same training left in peace.
"""

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.jobs.bench.broken import ON_HOSTS, SIGNALS, Fault, Run
from dtr_scale.jobs.bench.hosts import connected_hosts
from dtr_scale.jobs.bench.report import config, machine
from dtr_scale.jobs.bench.timing import spread
from dtr_scale.tracking.journal import Record

_APART_STEPS = range(15, 50)
# What Meta published for 1,024 GPUs (2410.21680).
_MTBF_SECONDS = 7.9 * 3600


def bench_faults(
    experiment: Experiment,
    arguments: Sequence[str],
    *,
    num: int,
    num_hosts: int,
    seed: int,
    place: str | None = None,
) -> dict[str, Any]:
    """Return the report of a training on two ranks that is broken `num` times.

    `arguments` are those of `dtr-scale train`. The faults are drawn by `seed`, each kind as often
    as the others. EngineError if the training does not come back.
    """
    draw = random.Random(seed)
    kinds = [*SIGNALS, *(ON_HOSTS if num_hosts > 1 else ())]
    plan = (kinds * (num // len(kinds) + 1))[:num]
    draw.shuffle(plan)
    apart = [draw.choice(_APART_STEPS) for _ in range(num + 1)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-", dir=place)))
        hosts = stack.enter_context(connected_hosts(2, sshd=False)) if num_hosts > 1 else None
        settings = _settings(max_steps=sum(apart) + num * max(_APART_STEPS))
        peace = Run([*arguments, *settings], folder / "peace", hosts, restarts=0)
        with peace.running():
            peace.wait_for(peace.has_ended)
        broken = Run([*arguments, *settings], folder / "broken", hosts, restarts=2 * num)
        faults: list[Fault] = []
        began = time.perf_counter()
        with broken.running():
            step = 0
            for kind, steps in zip(plan, apart, strict=False):
                # From where the fault before was: the steps in between are made for the first time.
                step = max(step + steps, broken.last_step)
                broken.wait_for(lambda step=step: broken.last_step >= step)
                # Into any part of a step: the journal's line comes at its end.
                time.sleep(draw.uniform(0, 0.2))
                faults.append(broken.suffer(kind, rank=draw.randrange(2)))
                print(_line(len(faults), faults[-1]), file=sys.stderr, flush=True)
            broken.wait_for(broken.has_ended)
        wall = time.perf_counter() - began
        equal = _num_equal(faults, peace.records(), broken.records())
    return _report(experiment, faults, equal, peace.records_seen, wall, num_hosts, seed)


def _settings(max_steps: int) -> list[str]:
    settings = {
        "train.max_steps": max_steps,
        "train.log_every": 1,
        "checkpoint.every_steps": 10,
        "checkpoint.dir": "null",
        "evaluation.every_steps": 0,
        "tracking.type": "none",
        "data.num_workers": 0,
    }
    return [f"--{key}={value}" for key, value in settings.items()]


def _num_equal(faults: Sequence[Fault], peace: list[Record], broken: list[Record]) -> int:
    """Return after how many faults the journal went on as if there had been none."""
    ends = [fault.step for fault in faults[1:]] + [len(peace)]
    return sum(
        broken[fault.resumed_step : end] == peace[fault.resumed_step : end]
        for fault, end in zip(faults, ends, strict=True)
    )


def _report(
    experiment: Experiment,
    faults: Sequence[Fault],
    equal: int,
    peace: Sequence[Record],
    wall_seconds: float,
    num_hosts: int,
    seed: int,
) -> dict[str, Any]:
    step_seconds = spread(
        [experiment.train.global_batch_size / r["samples_per_second"] for r in peace]
    )
    lost = [f.restart_seconds + (f.step - f.resumed_step) * step_seconds.median for f in faults]
    return {
        "bench": "faults",
        "faults": [fault._asdict() for fault in faults],
        "num_hosts": num_hosts,
        "seed": seed,
        "journals_equal": equal,
        "steps": len(peace),
        "step_seconds": step_seconds.median,
        "wall_seconds": wall_seconds,
        "goodput": len(peace) * step_seconds.median / wall_seconds,
        "goodput_at_1024_gpus": 1 - sum(lost) / len(lost) / _MTBF_SECONDS,
        "machine": machine(World(0, 0, 1, torch.device("cpu"))),
        "config": config(experiment),
    }


def _line(number: int, fault: Fault) -> str:
    return (
        f"{number:3} {fault.kind:8} rank {fault.rank} at step {fault.step}: noticed after "
        f"{fault.noticed_seconds:.1f} s, going on from step {fault.resumed_step} after "
        f"{fault.restart_seconds:.1f} s"
    )


def faults_table(report: dict[str, Any]) -> str:
    """Return a report as lines for a terminal."""
    faults = [Fault(**fault) for fault in report["faults"]]
    lines = [
        f"{len(faults)} faults on {report['num_hosts']} hosts with 2 ranks, seed {report['seed']}; "
        "seconds, median and largest",
        f"{'':10}{'number':>7}{'noticed':>9}{'':>7}{'first new step':>17}{'':>7}",
    ]
    for kind in (*SIGNALS, *ON_HOSTS, "all"):
        of_kind = [fault for fault in faults if kind in (fault.kind, "all")]
        if of_kind:
            noticed = spread([fault.noticed_seconds for fault in of_kind])
            restart = spread([fault.restart_seconds for fault in of_kind])
            lines.append(
                f"{kind:10}{len(of_kind):7}{noticed.median:9.1f}{noticed.max:7.1f}"
                f"{restart.median:17.1f}{restart.max:7.1f}"
            )
    return "\n".join(
        [
            *lines,
            f"journal as undisturbed after {report['journals_equal']} of {len(faults)}",
            f"goodput {report['goodput']:.1%} of {report['wall_seconds']:.0f} s; at one failure in "
            f"7.9 h, as of 1,024 GPUs, {report['goodput_at_1024_gpus']:.2%} without start-up of "
            "a larger network",
        ]
    )
