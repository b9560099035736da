"""Run the micro reproduction: prepare the data, keep the cores busy, tell how long it will take."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from dtr_scale.jobs.micro.comparison import DATA, LOGS, Micro, MicroRun
from dtr_scale.jobs.micro.measure import measure_real
from dtr_scale.jobs.prepare import prepare_idx
from dtr_scale.signals import LAUNCHER_PID, LeaveRequest
from dtr_scale.tracking.journal import last_step
from dtr_scale.train.run_dir import JOURNAL

log = logging.getLogger(__name__)

EXIT_FAILED, EXIT_GO_ON = 1, 75
_POLL_SECONDS, _TELL_SECONDS = 1.0, 60.0
_LEAVE_SECONDS = 60.0  # for the runs to checkpoint
MEASURING = 0.43
"""Part of a run's time that measuring takes; what is left is told by it until it is measured."""


def run_all(micro: Micro, *, parallel: int, arguments: Sequence[str]) -> int:
    """Train and measure what is missing, `parallel` runs at a time; return the exit code.

    A run is a process of its own, started by this command with `arguments` and `--only=NAME`. 75:
    this one was asked to leave, and goes on when it is started again.
    """
    request = LeaveRequest()
    with request.listening():
        micro.keep_plan()
        _prepare(micro)
        missing = [run for run in micro.runs if not micro.is_finished(run)]
        log.info("%d of %d runs are finished", len(micro.runs) - len(missing), len(micro.runs))
        failed = _Queue(micro, missing, arguments).work_off(parallel, request)
    if request.reason:
        log.info("leaving on request (%s): start the command again to go on", request.reason)
        return EXIT_GO_ON
    for run in failed:
        log.error("%s failed: see %s", run.name, _log_of(micro, run))
    return EXIT_FAILED if failed else 0


def _prepare(micro: Micro) -> None:
    size = micro.base.model.input_size
    if not (micro.data / "manifest.json").exists():
        prepare_idx(micro.source, size, str(micro.out / DATA))
    # All cores: nothing else runs yet. The runs take one each.
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    measure_real(micro)


class _Queue:
    """Runs that wait, and processes that run."""

    def __init__(self, micro: Micro, missing: list[MicroRun], arguments: Sequence[str]) -> None:
        self._micro = micro
        self._waiting = missing
        self._arguments = arguments
        self._running: dict[MicroRun, subprocess.Popen[bytes]] = {}
        self._begun = time.monotonic()
        self._done_before = self._done()

    def work_off(self, parallel: int, request: LeaveRequest) -> list[MicroRun]:
        """Run everything that waits; return what failed. A request to leave ends it early."""
        failed: list[MicroRun] = []
        told = self._begun
        with self._ended_with_this():
            while (self._waiting or self._running) and not request.reason:
                while self._waiting and len(self._running) < parallel:
                    self._start(self._waiting.pop(0))
                time.sleep(_POLL_SECONDS)
                for run, code in self._ended():
                    if code:
                        failed.append(run)
                    log.info("%s %s", run.name, f"ended with {code}" if code else "is finished")
                if time.monotonic() - told > _TELL_SECONDS:
                    told = time.monotonic()
                    log.info("%s", self._standing())
        return failed

    def _start(self, run: MicroRun) -> None:
        path = _log_of(self._micro, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "dtr_scale", *self._arguments, f"--only={run.name}"]
        # One thread each: two busy processes of two threads are ten times slower.
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        # A run leaves at its next step when this process is gone.
        environment = {**os.environ, **threads, LAUNCHER_PID: str(os.getpid())}
        with path.open("ab") as output:
            self._running[run] = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment
            )

    def _ended(self) -> Iterator[tuple[MicroRun, int]]:
        for run, process in list(self._running.items()):
            if (code := process.poll()) is not None:
                del self._running[run]
                yield run, code

    @contextmanager
    def _ended_with_this(self) -> Iterator[None]:
        try:
            yield
        finally:
            for process in self._running.values():
                process.terminate()
            deadline = time.monotonic() + _LEAVE_SECONDS
            for process in self._running.values():
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _done(self) -> float:
        return sum(map(self._part_done, self._micro.runs))

    def _part_done(self, run: MicroRun) -> float:
        points = self._micro.points
        trained = _step_of(self._micro, run) / points[-1]
        measured = len(self._micro.measured(run)) / len(points)
        return (1 - MEASURING) * trained + MEASURING * measured

    def _standing(self) -> str:
        done, total = self._done(), len(self._micro.runs)
        seconds = time.monotonic() - self._begun
        rate = (done - self._done_before) / seconds
        left = timedelta(seconds=round((total - done) / rate)) if rate > 0 else "unknown"
        steps = self._micro.points[-1]
        running = ", ".join(
            f"{run.name} {_step_of(self._micro, run)}/{steps}" for run in self._running
        )
        return f"{done / total:.0%} done, eta {left}; running: {running}"


def _step_of(micro: Micro, run: MicroRun) -> int:
    return last_step(micro.run_dir(run) / JOURNAL)


def _log_of(micro: Micro, run: MicroRun) -> Path:
    return micro.out / LOGS / f"{run.name}.txt"
