"""Decide which updates are made: none where loss or gradient is not finite, or spikes.

The verdict is made on the device, from limits that the host knows before the step, so nobody waits
for it. What happened is counted when the host reads the step's figures.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from torch import Tensor

from dtr_scale.train.figures import StepResult, StepSums

WINDOW = 128
"""Steps that the medians are of."""
_FEWEST = 32
"""Of them there must be so many before anything is a spike."""


class UpdateGuard:
    """Counts skipped updates, and tells how large the next step's loss and gradient may be.

    Without a `spike_factor` they need only be finite. With it, neither mse nor the norm may exceed
    that many times its median over the last steps that were updates: mse, since one sample of the
    cosine schedule's last timestep can make vb twenty times as large. Skipped updates in a row,
    `rollback_after` of them, take the run back to a checkpoint; `max_rollbacks` to the same one,
    and it ends.
    """

    def __init__(
        self,
        *,
        spike_factor: float | None = None,
        rollback_after: int = 10,
        max_rollbacks: int = 3,
    ) -> None:
        self.skipped_steps = 0
        self.rollbacks = 0
        """Also the salt by which the samples' draws differ from those before a rollback."""
        self.num_in_a_row = 0
        self._last_step = 0
        self.max_rollbacks = max_rollbacks
        self._spike_factor = spike_factor
        self._rollback_after = rollback_after
        # (step, mse, gradient norm) of updates; one more than a window, see `limits`.
        self._history: deque[tuple[int, float, float]] = deque(maxlen=WINDOW + 1)

    @property
    def last_update(self) -> int:
        """The step before those that were skipped in a row."""
        return self._last_step - self.num_in_a_row

    def counters(self) -> dict[str, float]:
        """Return what the journal tells of it, by key."""
        return {"skipped_steps": self.skipped_steps, "rollbacks": self.rollbacks}

    @staticmethod
    def rollbacks_of(meta: Mapping[str, Any]) -> int:
        """Return how many rollbacks a checkpoint's whole meta tells of."""
        return meta.get("updates", {}).get("rollbacks", 0)

    @property
    def wants_rollback(self) -> bool:
        return self.num_in_a_row >= self._rollback_after

    def limits(self, step: int) -> tuple[float, float]:
        """Return what mse and gradient norm of `step` must be below.

        They follow from the steps up to the one before the last. A GPU has no later ones, and on a
        CPU, after a save or a resume the same must come out.
        """
        if self._spike_factor is None:
            return math.inf, math.inf
        known = [(mse, norm) for at, mse, norm in self._history if at < step - 1][-WINDOW:]
        if len(known) < _FEWEST:
            return math.inf, math.inf
        # A median of 0 says nothing of what is usual.
        mse, norm = (self._spike_factor * median(values) for values in zip(*known, strict=True))
        return mse or math.inf, norm or math.inf

    def note(self, result: StepResult) -> None:
        """Count a step whose figures have been read; every step, in their order."""
        self._last_step = result.step
        self.skipped_steps += result.is_skipped
        self.num_in_a_row = self.num_in_a_row + 1 if result.is_skipped else 0
        if self._spike_factor is not None and not result.is_skipped:
            self._history.append((result.step, result.mse, result.grad_norm))

    def meta(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a resumed run decides the same."""
        return {
            "skipped_steps": self.skipped_steps,
            "in_a_row": self.num_in_a_row,
            "rollbacks": self.rollbacks,
            "history": [list(entry) for entry in self._history],
        }

    def load(self, meta: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `meta`; {} of those that are older than this."""
        self.skipped_steps = meta.get("skipped_steps", 0)
        self.num_in_a_row = meta.get("in_a_row", 0)
        self.rollbacks = meta.get("rollbacks", 0)
        self._history.clear()
        self._history.extend((step, mse, norm) for step, mse, norm in meta.get("history", []))


class Verdict:
    """One step's verdict on the device, made when the engine knows the gradient's norm.

    `limits` are what mse and norm must be below.
    """

    skip: Tensor
    """fp32 []: 1 where the update is not to be made, else 0. PyTorch's fused optimizers call it
    `found_inf`, and leave weights, moments and their own step count alone where it is 1."""

    def __init__(self, sums: StepSums, num_samples: int, limits: tuple[float, float]) -> None:
        self._sums = sums
        self._mse_limit, self._norm_limit = limits[0] * num_samples, limits[1]

    def __call__(self, grad_norm: Tensor) -> Tensor:
        """Return `skip`, the same on all ranks, since the numbers are sums over all of them."""
        # False for nan, and for inf where the limit is inf.
        is_good = (self._sums.loss < math.inf) & (grad_norm < self._norm_limit)
        if self._mse_limit < math.inf:
            is_good &= self._sums.mse < self._mse_limit
        self.skip = is_good.logical_not().float()
        return self.skip
