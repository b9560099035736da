"""Tell how a run's devices are doing: arithmetic, memory, power, and a rank that is slow."""

import logging
import resource
import time
from collections.abc import Sequence

import torch

from dtr_scale.engines.nvml import open_energy_counter
from dtr_scale.tracking.journal import Record

log = logging.getLogger(__name__)

_SLOW = 1.5  # times the median
_LEAST_SECONDS = 0.02  # more than it: nobody waits for the jitter of a few milliseconds
_RECORDS = 2  # in a row: one may be of a step that compiled


class Health:
    """Adds to records what rank 0's device does, and what all of them compute.

    `flops_per_sample` are those of a sample's training, None where they are not known, and
    `peak_flops` a device's own peak by its data sheet. `tokens_per_sample` is 0 for a network that
    has none.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        world_size: int,
        flops_per_sample: float | None,
        peak_flops: float | None,
        tokens_per_sample: int,
    ) -> None:
        self._world_size = world_size
        self._flops_per_sample = flops_per_sample
        self._peak_flops = peak_flops
        self._tokens_per_sample = tokens_per_sample
        self._energy = open_energy_counter(device)
        self._before = self._read_energy()

    def added_to(self, record: Record) -> Record:
        """Return a record with its throughput as arithmetic, and memory and power of rank 0's."""
        figures: Record = {"memory_gb": memory_gb()}
        rate = record["samples_per_second"]
        if self._tokens_per_sample:
            figures["tokens_per_second"] = rate * self._tokens_per_sample
        if self._flops_per_sample:
            flops = rate * self._flops_per_sample / self._world_size
            figures["tflops"] = flops / 1e12
            if self._peak_flops:
                figures["mfu"] = flops / self._peak_flops
        return {**record, **figures, **self._power()}

    def _power(self) -> Record:
        """Return the mean since the record before: a moment's power jumps within a step."""
        if self._before is None or (now := self._read_energy()) is None:
            return {}
        joules, seconds = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        return {"power_watts": joules / seconds}

    def _read_energy(self) -> tuple[float, float] | None:
        joules = self._energy.read() if self._energy else None
        return None if joules is None else (joules, time.monotonic())


class SlowRank:
    """Names a rank that all others wait for, once."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._suspect, self._num_records = -1, 0

    def look(self, record: Record) -> None:
        """Warn if the same rank has been much slower than the median for some records."""
        slowest, median = record.get("slowest_rank_seconds"), record.get("median_rank_seconds")
        if slowest is None or median is None:
            return
        is_slow = slowest > max(_SLOW * median, median + _LEAST_SECONDS)
        rank = int(record["slowest_rank"]) if is_slow else -1
        self._num_records = self._num_records + 1 if rank == self._suspect else 1
        self._suspect = rank
        if rank >= 0 and self._num_records == _RECORDS:
            log.warning(
                "rank %d on %s takes %.3g s of a step for its data and its forwards, half of the "
                "ranks at most %.3g s, and all wait for it; look at that host: its clocks, other "
                "jobs on it, its data",
                rank,
                self._hosts[rank],
                slowest,
                median,
            )


def memory_gb() -> float:
    """Return the most memory in use so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
