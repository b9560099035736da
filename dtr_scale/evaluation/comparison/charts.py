"""Choose the charts of a comparison, and of one run."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dtr_scale.evaluation.comparison.curves import Curve, journal_curves
from dtr_scale.evaluation.comparison.plots import Chart
from dtr_scale.evaluation.comparison.record import AXES, LOSS, Evaluation, RunRecord, letters
from dtr_scale.evaluation.comparison.results import (
    HELD_OUT_LOSS,
    curve_metrics,
    held_out_clusters,
    manifest_differences,
    metric_curves,
    not_comparable,
)

_MOST_METRICS = 8
LOG_VAR, CLUSTER_LOSS = "uw_log_var", "loss_cluster"


class ChartSet(NamedTuple):
    """A chart against each of the axes that its runs have."""

    name: str
    """Of its PNG, and of its ids in the page: letters, digits and _."""
    charts: Sequence[Chart]
    """One for each axis, in their order."""
    caution: str = ""


class Panels(NamedTuple):
    """Charts of the same kind, one for each cluster of timesteps."""

    name: str
    title: str
    sets: Sequence[ChartSet]
    note: str

    @property
    def caution(self) -> str:
        """The caution of all charts: they are of the same evaluations."""
        return self.sets[0].caution


_LOSSES = {LOSS: Chart("Training loss", [], unit="mse + vb", late=True, spread=True)}
_HELD_OUT = Chart("Held-out loss", [], unit="mse + vb", late=True, points=True)
_SPEEDS = {
    "samples_per_second": Chart("Throughput", [], unit="samples/s"),
    "data_wait_fraction": Chart("Waiting for data", [], unit="share of the time"),
    "grad_norm": Chart("Gradient norm", [], log=True, late=True),
}


def result_charts(runs: Sequence[RunRecord]) -> list[ChartSet]:
    """Return the losses and the evaluations' numbers."""
    found = [*_journal_sets(runs, _LOSSES), *metric_charts(runs)]
    return [each for each in found if each.charts]


def speed_charts(runs: Sequence[RunRecord]) -> list[ChartSet]:
    """Return throughput, waiting for data and the norm of the gradient."""
    return [each for each in _journal_sets(runs, _SPEEDS) if each.charts]


def cluster_panels(runs: Sequence[RunRecord]) -> list[Panels]:
    """Return what is told of each cluster of timesteps: losses, and the weights of ANT-UW."""
    found = [
        Panels(
            "clusters",
            "Training loss by cluster",
            _per_cluster(runs, CLUSTER_LOSS, Chart("", [], late=True)),
            "Cluster 0 has the smallest timesteps, the least noise.",
        ),
        Panels(
            "held_out_clusters",
            "Held-out loss by cluster",
            [
                _metric_set(runs, metric, _HELD_OUT._replace(title=f"cluster {k}", unit=""))
                for k, metric in enumerate(held_out_clusters(curve_metrics(runs)))
            ],
            "At the same noise at every evaluation.",
        ),
        Panels(
            "uncertainty_weights",
            "Uncertainty weights by cluster",
            _per_cluster(runs, LOG_VAR, Chart("", [], unit="exp(-s)")),
            "ANT-UW weights the loss of cluster k by exp(-s_k), s_k its learned log-variance.",
        ),
    ]
    return [each for each in found if each.sets]


def _journal_sets(runs: Sequence[RunRecord], charts: dict[str, Chart]) -> list[ChartSet]:
    return [
        ChartSet(
            _plain(chart.title),
            _against_each_axis(chart, [journal_curves(runs, key, axis) for axis in AXES]),
        )
        for key, chart in charts.items()
    ]


def _per_cluster(runs: Sequence[RunRecord], prefix: str, chart: Chart) -> list[ChartSet]:
    sets = []
    for k in cluster_numbers(runs, prefix):
        curves = [journal_curves(runs, f"{prefix}_{k}", axis) for axis in AXES]
        if prefix == LOG_VAR:
            curves = [[c._replace(y=np.exp(-c.y)) for c in of_axis] for of_axis in curves]
        titled = chart._replace(title=f"cluster {k}")
        sets.append(ChartSet(f"{prefix}_{k}", _against_each_axis(titled, curves)))
    return sets


def cluster_numbers(runs: Sequence[RunRecord], prefix: str) -> list[int]:
    """Return the clusters of which journals have a figure, by the beginning of its key."""
    keys = {key for run in runs for key in run.journal}
    matches = [match for key in keys if (match := re.fullmatch(rf"{prefix}_(\d+)", key))]
    return sorted(int(match[1]) for match in matches)


def metric_charts(runs: Sequence[RunRecord]) -> list[ChartSet]:
    """Return the numbers of evaluations that were made at two steps or more."""
    names = curve_metrics(runs)
    clusters = held_out_clusters(names)
    shown = sorted((n for n in names if n not in clusters), key=lambda n: n != HELD_OUT_LOSS)
    return [
        _metric_set(
            runs,
            metric,
            _HELD_OUT if metric == HELD_OUT_LOSS else Chart(metric, [], log=True, points=True),
        )
        for metric in shown[:_MOST_METRICS]
    ]


def _metric_set(runs: Sequence[RunRecord], metric: str, chart: Chart) -> ChartSet:
    series = metric_curves(runs, metric)
    curves: list[list[Curve]] = [[] for _ in AXES]
    for index, (run, points) in enumerate(zip(runs, series, strict=True)):
        known = [each for each in points if each.step is not None]
        steps = np.array([float(each.step or 0) for each in known])
        y = np.array([float(each.metrics[metric]) for each in known])
        for of_axis, axis in zip(curves, AXES, strict=True):
            if known and (x := run.at(axis, steps)) is not None:
                of_axis.append(Curve(index, x, y))
    caution = _caution([each[-1] if each else None for each in series])
    return ChartSet(_plain(metric), _against_each_axis(chart, curves), caution)


def _caution(chosen: Sequence[Evaluation | None]) -> str:
    differences = manifest_differences(chosen)
    names = letters(len(chosen))
    told = [
        f"{key} ({', '.join(f'{n} {v}' for n, v in zip(names, values, strict=True) if v)})"
        for key, values in differences.items()
    ]
    return not_comparable("their manifests", told) if told else ""


def _against_each_axis(chart: Chart, curves: Sequence[list[Curve]]) -> list[Chart]:
    return [
        chart._replace(curves=of_axis, axis=axis)
        for axis, of_axis in zip(AXES, curves, strict=True)
        if of_axis
    ]


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower())
