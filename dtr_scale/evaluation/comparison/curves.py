"""Make curves of what runs have recorded, of few enough points to be drawn quickly."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dtr_scale.evaluation.comparison.record import RunRecord

MOST_POINTS = 300
"""Of a curve that is drawn. A journal of 2M steps has 20,000."""
SMOOTHED_SHARE = 0.025
"""Part of a run's records that one point of a smoothed curve is the mean of."""


class Curve(NamedTuple):
    """A figure of one run against one axis, float64 [n] each."""

    run: int
    """The run's place among those compared."""
    x: np.ndarray
    y: np.ndarray
    """Smoothed, where the figure is of single steps."""
    deviation: np.ndarray | None = None
    """The standard deviation of what a point is the mean of."""


def journal_curves(runs: Sequence[RunRecord], key: str, axis: str) -> list[Curve]:
    """Return a figure of the journals against an axis, smoothed; runs without it are left out."""
    curves = []
    for index, run in enumerate(runs):
        x, y = run.column(axis), run.column(key)
        if x is not None and y is not None and np.isfinite(y).any():
            curves.append(thinned(index, x, y))
    return curves


def thinned(run: int, x: np.ndarray, y: np.ndarray) -> Curve:
    """Return a noisy figure as its running mean and deviation, at few enough points to draw."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    width = round(len(y) * SMOOTHED_SHARE)
    # Around one value, or the difference of two large numbers would lose its digits.
    centre = y.mean()
    mean, square = running_mean(y - centre, width), running_mean((y - centre) ** 2, width)
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    shown = np.unique(np.linspace(0, len(y) - 1, MOST_POINTS).round().astype(int))
    return Curve(run, x[shown], (mean + centre)[shown], deviation[shown])


def running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of about `width` values around each; of half as many at both ends."""
    half = max(width, 1) // 2
    sums = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    first, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(y))
    return (sums[stop] - sums[first]) / (stop - first)


def last_common_step(runs: Sequence[RunRecord]) -> int:
    """Return the last step that all runs have reached."""
    return min(run.step for run in runs)


def mean_before(run: RunRecord, key: str, step: int) -> float:
    """Return the mean of a figure over the records just before a step; nan if there are none.

    As many records as a smoothed curve takes of the whole run, so that runs of one length are
    treated alike.
    """
    values = run.column(key)
    if values is None:
        return float("nan")
    values = values[(run.journal["step"] <= step) & np.isfinite(values)]
    count = max(1, round(len(values) * SMOOTHED_SHARE))
    return float(values[-count:].mean()) if len(values) else float("nan")
