"""Measure a run's speed: throughput, the time of a step, waiting for data, GPU hours."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from dtr_scale.data.batch import MicroBatch
from dtr_scale.tracking.journal import Record, read_journal


class Stopwatch:
    """Throughput, time per step and the share spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start = self._last = time.perf_counter()
        self._waited = 0.0
        self._samples = 0
        self._steps: list[float] = []

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
        out = time.perf_counter() - before
        self._start += out
        self._last += out

    def count(self, samples: int) -> float:
        """Count a step of so many samples that is done; return the seconds it took."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._samples += samples
        self._steps.append(seconds)
        return seconds

    def read(self) -> Record:
        # No device sync: steps are counted when the loop has read their figures, so all are done.
        elapsed = time.perf_counter() - self._start
        figures: Record = {
            "samples_per_second": self._samples / elapsed,
            "data_wait_fraction": self._waited / elapsed,
            # Of a usual step: neither the first, which compiles, nor one that saves shows in it.
            "step_seconds": median(self._steps),
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
