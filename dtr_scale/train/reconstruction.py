"""Make a power-function average of any width out of stored ones (Karras et al., 2024, app. C.3)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dtr_scale.train.ema import power_gamma


class StoredAverage(NamedTuple):
    """A power-function average as it stood after `step`."""

    step: int
    sigma_rel: float
    began: int = 0
    """The step whose weights it began at: they hold what would have been the share of the past."""


def combine(
    stored: Sequence[StoredAverage], step: int, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """Return how to make the average of width `sigma_rel` at `step`, and how far it stays from it.

    The first result holds the weights of the `stored` averages, float64 [n] of sum 1, by least
    squares over the profiles. The second is the distance of the profile reached, relative to the
    wanted one's norm.
    """
    profiles = [_Profile(average) for average in stored]
    goal = _Profile(StoredAverage(step, sigma_rel))
    gram = np.array([[_inner(a, b) for b in profiles] for a in profiles])
    towards = np.array([_inner(a, goal) for a in profiles])
    # To norms of 1: an average that has just begun is a million times as long as an old one, and
    # the small singular values that separate the old ones would fall under `rcond`.
    norms = np.sqrt(np.diagonal(gram))
    scaled = gram / np.outer(norms, norms)
    weights = np.linalg.lstsq(scaled, towards / norms, rcond=1e-12)[0] / norms
    # As EDM2 does: with any other sum the weights of the network itself would be scaled.
    weights /= weights.sum()
    # |reached - wanted|^2, multiplied out. Rounding may take it below 0.
    rest = _inner(goal, goal) - 2 * weights @ towards + weights @ gram @ weights
    return weights, float(np.sqrt(max(rest, 0.0) / _inner(goal, goal)))


class _Profile:
    """The share that the weights after each training step have in an average.

    From `began` on it is the density (gamma + 1) tau^gamma / t^(gamma + 1) (eq. 3); the share of
    all steps before lies on the weights after step `began` alone.
    """

    def __init__(self, average: StoredAverage) -> None:
        self.step, sigma_rel, self.began = average
        self.gamma = power_gamma(sigma_rel)
        self.first_share = self._until(self.began)

    def share(self, step: int) -> float:
        """Return the share of the weights after one step."""
        if step == self.began:
            return self.first_share
        return self._until(step) - self._until(step - 1) if self.began < step <= self.step else 0.0

    def _until(self, step: int) -> float:
        # Relative times, here and below: powers of millions of steps would overflow.
        return (step / self.step) ** (self.gamma + 1)


def _inner(a: _Profile, b: _Profile) -> float:
    """Return the sum over all steps of the product of two profiles."""
    exponent = a.gamma + b.gamma + 1

    def integral(until: int) -> float:
        relative = (until / a.step) ** a.gamma * (until / b.step) ** b.gamma
        return (a.gamma + 1) * (b.gamma + 1) / exponent * relative * until / a.step / b.step

    first, last = max(a.began, b.began), min(a.step, b.step)
    total = integral(last) - integral(first) if first < last else 0.0
    # Beside the density, the share of the time before an average began lies on one step.
    total += a.first_share * b.share(a.began)
    if b.began != a.began:  # else this is the same product
        total += b.first_share * a.share(b.began)
    return total
