"""Compute the learning rate of a step: a closed form of its number, so nothing of it is saved."""

import math
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["constant", "cosine", "wsd"]


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to `peak`, then a schedule that ends at `final` with step `max_steps`.

    "constant" stays at the peak, "cosine" follows half a period, and "wsd" (warm-up, stable, decay)
    stays until `decay_steps` before the end and then falls linearly.
    """

    peak: float
    max_steps: int
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    decay_steps: int = 1
    final: float = 0.0

    def at(self, step: int) -> float:
        """Return the rate of the update that makes step `step` of the weights, 1, 2, ..."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        share = self._share(step)
        return share * self.peak + (1 - share) * self.final  # exact at both ends

    def _share(self, step: int) -> float:
        """Return how much of the way from `final` to `peak` is left, 1 at first."""
        left = max(self.max_steps - step, 0)
        if self.schedule == "cosine":
            return (1 - math.cos(math.pi * left / max(self.max_steps - self.warmup_steps, 1))) / 2
        if self.schedule == "wsd":
            return min(left / self.decay_steps, 1.0)
        return 1.0
