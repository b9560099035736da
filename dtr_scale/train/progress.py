"""Measure a run's speed and show it: a bar on a terminal, plain lines in a log file."""

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from dtr_scale.data.batch import MicroBatch
from dtr_scale.tracking.journal import Record, read_journal

log = logging.getLogger(__name__)


class Stopwatch:
    """Throughput and the share of the time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._samples = 0

    def next_of(self, batches: Iterator[MicroBatch]) -> MicroBatch:
        before = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - before
        return batch

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out what takes place meanwhile and is no training."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def count(self, samples: int) -> None:
        self._samples += samples

    def read(self) -> Record:
        # No device sync: steps are counted when the loop has read their figures, so all are done.
        elapsed = time.perf_counter() - self._start
        figures: Record = {
            "samples_per_second": self._samples / elapsed,
            "data_wait_fraction": self._waited / elapsed,
        }
        self.restart()
        return figures


class GpuHours:
    """Hours times ranks that the journal's steps have taken, over all jobs of a run.

    Steps that were lost with a kill and made again count once: it is an axis to compare runs on.
    """

    def __init__(self, journal: Path, samples_seen: int, world_size: int) -> None:
        # On a new host there is no journal of the steps before.
        last = next(reversed(list(read_journal(journal))), {"samples_seen": samples_seen})
        self._hours = last.get("gpu_hours", 0.0)
        self._samples_seen = last["samples_seen"]
        self._world_size = world_size

    def added_to(self, record: Record) -> Record:
        """Return a record with the hours up to its step."""
        samples = record["samples_seen"] - self._samples_seen
        self._samples_seen = record["samples_seen"]
        self._hours += samples / record["samples_per_second"] * self._world_size / 3600
        return {**record, "gpu_hours": self._hours}


class Progress:
    """Shows every logged step: loss, speed, waiting for data, time left and memory."""

    def __init__(self, *, step: int, max_steps: int) -> None:
        self._first_step = step
        self._max_steps = max_steps
        self._start = time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            layout = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=max_steps, initial=step, unit="step", bar_format=layout)

    def show(self, record: Record) -> None:
        step = int(record["step"])
        figures = (
            f"loss {record['loss']:.4f}  {record['samples_per_second']:.1f} samples/s  "
            f"data wait {record['data_wait_fraction']:.0%}  eta {self._time_left(step)}  "
            f"mem {_memory_gb():.1f} GB"
        )
        if self._bar is None:
            log.info("step %d/%d  %s", step, self._max_steps, figures)
        else:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _time_left(self, step: int) -> timedelta:
        seconds_per_step = (time.monotonic() - self._start) / max(1, step - self._first_step)
        return timedelta(seconds=round((self._max_steps - step) * seconds_per_step))


def _memory_gb() -> float:
    """Return the most memory in use so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
