"""Measure a run's speed: throughput, the time of a step and of each rank, waits, GPU hours."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, median_low

import torch

from dtr_scale.data.batch import MicroBatch
from dtr_scale.tracking.journal import Record, read_journal


class Stopwatch:
    """Throughput, time per step, waits for data and for saves, since the last reading."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start = self._last = time.perf_counter()
        self._waited = self._stalled = 0.0
        self._samples = 0
        self._steps: list[float] = []

    def next_of(self, batches: Iterator[MicroBatch]) -> MicroBatch:
        before = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - before
        return batch

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Time what a save makes the loop wait for."""
        before = time.perf_counter()
        yield
        self._stalled += time.perf_counter() - before

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
            "checkpoint_stall_seconds": self._stalled,
        }
        self.restart()
        return figures


class OwnWork:
    """Times what a rank does by itself in a step: wait for data, and compute its forwards.

    A whole step takes all ranks the same time: in the exchange of gradients each waits for the
    slowest. On a GPU events tell the time, whose difference is read when their step is done: the
    host waits for nothing. Where a forward gathers sharded weights, it waits for others as well.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._start = 0.0
        self._seconds = 0.0
        self._events: list[torch.cuda.Event] = []
        self._queued: deque[list[torch.cuda.Event]] = deque()
        self.latest = 0.0
        """Seconds of the newest step of which they are known; 0 before there is one."""

    def begin(self) -> None:
        """Mark where a micro-step begins."""
        self._mark()
        self._start = time.perf_counter()

    def end(self) -> None:
        """Mark the end of its forward."""
        self._seconds += time.perf_counter() - self._start
        self._mark()

    def end_step(self) -> None:
        """Mark that the step has no more forwards."""
        if self._on_gpu:
            self._queued.append(self._events)
            self._events = []
        else:
            self.latest = self._seconds
        self._seconds = 0.0

    def conclude(self) -> None:
        """Take the time of the oldest step that was queued, which the device has done."""
        if self._on_gpu:
            events = self._queued.popleft()
            pairs = zip(events[::2], events[1::2], strict=True)
            self.latest = sum(start.elapsed_time(end) for start, end in pairs) / 1000

    def _mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)


class RankTimes:
    """The mean of every rank's own work over the steps since the last reading."""

    def __init__(self) -> None:
        self._sums: list[float] = []
        self._num_steps = 0

    def add(self, seconds: Sequence[float]) -> None:
        """Count a step by each rank's seconds: none in a world of one, 0 where not yet known."""
        if not any(seconds):
            return
        sums = self._sums or [0.0] * len(seconds)
        self._sums = [total + new for total, new in zip(sums, seconds, strict=True)]
        self._num_steps += 1

    def read(self) -> Record:
        """Return which rank is the slowest, its seconds a step, and those of the median."""
        means = [total / self._num_steps for total in self._sums]
        self._sums, self._num_steps = [], 0
        if not means:
            return {}
        slowest = max(range(len(means)), key=means.__getitem__)
        return {
            "slowest_rank": slowest,
            "slowest_rank_seconds": means[slowest],
            # Of two ranks the faster one's: their mean would rise with the slow one and hide it.
            "median_rank_seconds": median_low(means),
        }


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
