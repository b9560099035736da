"""Estimate how much of a long run counts, and how often to save for it."""

import math
from dataclasses import dataclass

GPU_HOURS_PER_FAILURE = 7.9 * 1024
"""Meta's clusters: a failure every 7.9 hours of a job on 1,024 GPUs (Kokolis et al., 2024,
"Revisiting Reliability in Large-Scale Machine Learning Research Clusters", arXiv 2410.21680)."""


@dataclass(frozen=True)
class Failures:
    """What failures cost a job."""

    seconds_between: float
    """Mean time between two of them."""
    restart_seconds: float
    """From a failure to the first new step: noticing, starting, loading."""
    stall_seconds: float
    """That training stands still for one save."""
    write_seconds: float
    """Until a save is complete, while training goes on."""

    def goodput(self, interval_seconds: float) -> float:
        """Return the share of time that goes into steps that count.

        A failure comes at any moment of an interval, so it costs half of it, and the interval's
        checkpoint counts only when it is written.
        """
        lost = self.restart_seconds + self.write_seconds + interval_seconds / 2
        saving = self.stall_seconds / (interval_seconds + self.stall_seconds)
        # Per failure `lost` seconds are wasted, of which there is one in every seconds_between of
        # wall-clock time (Daly, 2006, eq. 8, to first order).
        return max(0.0, (1 - saving) * (1 - lost / self.seconds_between))

    def best_interval(self) -> float:
        """Return Young's interval in seconds, sqrt(2 x stall x time between failures).

        (Young, 1974; Daly, 2006.) At least twice what a save needs to be written, or the next one
        would wait for it.
        """
        young = math.sqrt(2 * self.stall_seconds * self.seconds_between)
        return max(young, 2 * self.write_seconds)


def seconds_between_failures(gpu_hours: float, world_size: int) -> float:
    """Return the mean time between failures of a job, of whose GPUs each fails independently."""
    return gpu_hours / world_size * 3600


def rounded_steps(steps: float) -> int:
    """Return the round number that is nearest by ratio: 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(max(1.0, steps)))
    digits = (1, 2, 5, 10)
    return power * min(digits, key=lambda digit: abs(math.log(digit * power / max(1.0, steps))))
