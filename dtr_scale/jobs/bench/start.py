"""Measure how long a training takes from its command to its first step."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import EngineError
from dtr_scale.jobs.bench.report import config, machine
from dtr_scale.jobs.bench.timing import spread
from dtr_scale.logs import ProgressBar
from dtr_scale.tracking.journal import read_journal

_POLL_SECONDS = 0.02
_JOURNAL = "journal.jsonl"


def bench_start(
    experiment: Experiment,
    arguments: Sequence[str],
    *,
    rounds: int,
    launcher: str | None = None,
    place: str | None = None,
) -> dict[str, Any]:
    """Return the report of a run that is started cold, and then resumed so many times.

    `arguments` are those of `dtr-scale train`; `launcher` comes before `-m dtr_scale`, by default
    this Python. Cold is without anything compiled; each resumed start finds all of it, and makes a
    step more. The run's directory, below `place`, is removed. Raises EngineError if one fails.
    """
    with tempfile.TemporaryDirectory(prefix="dtr-scale-bench-", dir=place) as folder:
        program = shlex.split(launcher) if launcher else [sys.executable]
        command = [*program, "-m", "dtr_scale", "train", *arguments]
        with ProgressBar("starts", 1 + rounds) as bar:
            first, total = _start(command, Path(folder), max_steps=1)
            resumed = []
            for number in range(rounds):
                bar.advance()
                resumed.append(_start(command, Path(folder), max_steps=2 + number)[0])
    return {
        "bench": "start",
        "cold_first_step_seconds": first,
        "cold_total_seconds": total,
        "resumed_first_step_seconds": spread(resumed).median,
        "resumed": spread(resumed)._asdict(),
        "rounds": rounds,
        "launcher": launcher,
        # The device is the training's own matter: this process has not looked for one.
        "machine": machine(World(0, 0, 1, torch.device("cpu"))),
        "config": config(experiment),
    }


def _start(command: list[str], folder: Path, max_steps: int) -> tuple[float, float]:
    """Train up to a step; return the seconds until it stood in the journal, and until the end."""
    run_dir = folder / "run"
    settings = {
        "run_dir": run_dir,
        "checkpoint.dir": "null",
        "train.max_steps": max_steps,
        "train.log_every": 1,
        "evaluation.every_steps": 0,
        "tracking.type": "none",
    }
    # Empty ones, or the cold start would find what this user's other runs have compiled.
    caches = {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    log = folder / "log"
    began = time.perf_counter()
    command = [*command, *(f"--{key}={value}" for key, value in settings.items())]
    with log.open("wb") as file, _running(command, {**os.environ, **caches}, file) as process:
        while not _has_step(run_dir / _JOURNAL, max_steps):
            if process.poll() is not None and not _has_step(run_dir / _JOURNAL, max_steps):
                lines = log.read_text(errors="replace").strip().splitlines()
                raise EngineError(
                    f"the training ended with exit code {process.returncode} before its step "
                    f"{max_steps}: {lines[-1] if lines else 'it told nothing'}"
                )
            time.sleep(_POLL_SECONDS)
        first = time.perf_counter() - began
        process.wait()
    return first, time.perf_counter() - began


def _has_step(journal: Path, step: int) -> bool:
    return journal.exists() and any(record["step"] == step for record in read_journal(journal))


@contextmanager
def _running(
    command: list[str], environment: dict[str, str], output: BinaryIO
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command in a session of its own, and leave nothing of it behind."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # A launcher that is killed would leave its ranks.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start_table(report: dict[str, Any]) -> str:
    """Return a report as lines for a terminal."""
    resumed = report["resumed"]
    return "\n".join(
        [
            "from the command to the first step, in seconds",
            f"cold, nothing compiled  {report['cold_first_step_seconds']:9.2f}",
            f"  to its end, saved     {report['cold_total_seconds']:9.2f}",
            f"resumed, {report['rounds']} times{'':7}{resumed['median']:9.2f}  "
            f"({resumed['min']:.2f} to {resumed['max']:.2f})",
        ]
    )
