"""Choose the charts of one run."""

from collections.abc import Mapping

from dtr_scale.evaluation.comparison.charts import (
    CLUSTER_LOSS,
    LOG_VAR,
    cluster_numbers,
    metric_charts,
)
from dtr_scale.evaluation.comparison.curves import Curve, journal_curves
from dtr_scale.evaluation.comparison.plots import Chart
from dtr_scale.evaluation.comparison.record import LOSS, RunRecord
from dtr_scale.evaluation.comparison.results import HELD_OUT_LOSS

_SPEED = Chart("Throughput", [], unit="samples/s")
_WAIT = Chart("Waiting for data", [], unit="share of the time")
_NORM = Chart("Gradient norm", [], late=True)


def run_charts(run: RunRecord) -> dict[str, Chart]:
    """Return the charts of what a run has recorded, by name; those of nothing are left out."""
    metrics = {each.name: each.charts[0]._replace(names=[""]) for each in metric_charts([run])}
    held_out = metrics.pop(HELD_OUT_LOSS, None)
    losses = {"train": _curve(run, LOSS), "held out": held_out and held_out.curves[0]}
    charts = {
        "loss": _named(losses, Chart("Loss", [], unit="mse + vb", late=True)),
        "clusters": _named(_by_cluster(run, CLUSTER_LOSS), Chart("Loss by cluster", [], log=True)),
        "log_variances": _named(_by_cluster(run, LOG_VAR), Chart("Log-variances s_k", [])),
        "throughput": _named({"": _curve(run, "samples_per_second")}, _SPEED),
        "data_wait": _named({"": _curve(run, "data_wait_fraction")}, _WAIT),
        "grad_norm": _named({"": _curve(run, "grad_norm")}, _NORM),
        **metrics,
    }
    return {name: chart for name, chart in charts.items() if chart.curves}


def _named(curves: Mapping[str, Curve | None], chart: Chart) -> Chart:
    """Return a chart with curves, each with its name at its end and a colour of its own."""
    drawn = [
        curve._replace(run=place)
        for place, curve in enumerate(curves.values())
        if curve is not None
    ]
    return chart._replace(curves=drawn, names=list(curves))


def _by_cluster(run: RunRecord, prefix: str) -> dict[str, Curve | None]:
    return {str(k): _curve(run, f"{prefix}_{k}") for k in cluster_numbers([run], prefix)}


def _curve(run: RunRecord, key: str) -> Curve | None:
    return next(iter(journal_curves([run], key, "step")), None)
