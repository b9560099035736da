"""What is drawn of a method is what its training uses at each timestep."""

import numpy as np
import pytest
import torch

from dtr_scale.config.load import load_experiment
from dtr_scale.evaluation.comparison.plots import Chart, Mask, drawings_png
from dtr_scale.evaluation.comparison.record import RunRecord
from dtr_scale.jobs.build import build_diffusion, build_timesteps
from dtr_scale.jobs.method import method_drawings
from dtr_scale.models.routing import routing_mask
from dtr_scale.objectives.weighting import loss_weight
from tests.support.runs import DEMO

LOG_VARS = np.linspace(-1, 2, 8)


def drawings(*overrides):
    experiment = load_experiment(DEMO, [*overrides])
    journal = {"step": np.array([1.0, 2.0])}
    journal |= {f"uw_log_var_{k}": np.array([0.0, s]) for k, s in enumerate(LOG_VARS)}
    return experiment, method_drawings(experiment, RunRecord("a", "runs/a", {}, journal))


def at(chart, t):
    """The value of a step function, or of a curve with a point for each timestep, at t."""
    (curve,) = chart.curves
    return curve.y[np.searchsorted(curve.x, t, side="right") - 1]


@pytest.mark.parametrize("clusters", ["timestep", "log_snr"])
def test_clusters_and_weights_are_those_of_training(clusters):
    experiment, drawn = drawings(f"--objective.clusters={clusters}")
    timesteps = build_timesteps(experiment, build_diffusion(experiment))
    found, weights = drawn["boundaries"], drawn["loss_weights"]
    assert isinstance(found, Chart) and isinstance(weights, Chart)
    assert found.bands == weights.bands == timesteps.boundaries.tolist()
    t, cluster = timesteps.draw(0, np.arange(64))
    expected = np.exp(-LOG_VARS)[cluster]
    np.testing.assert_allclose([at(weights, each) for each in t], expected)
    snr = build_diffusion(experiment).snr(torch.from_numpy(t)).numpy()
    np.testing.assert_allclose([at(found, each) for each in t], np.log(snr), rtol=1e-4)
    assert drawings_png(list(drawn.values()), "below", columns=3).startswith(b"\x89PNG")


def test_gradient_clusters_are_drawn_where_they_were_found():
    found = "[0, 10, 500, 1000]"
    _, drawn = drawings(
        "--objective.clusters=gradient", f"--objective.boundaries={found}",
        "--objective.num_clusters=3",
    )  # fmt: skip
    chart = drawn["boundaries"]
    assert isinstance(chart, Chart)
    assert (chart.title, chart.bands) == ("Clusters of alike gradients", [0, 10, 500, 1000])


def test_weights_by_the_snr_are_those_of_the_loss():
    experiment, drawn = drawings("--objective.type=min_snr", "--model.routing.type=none")
    assert list(drawn) == ["loss_weights"], "neither masks nor clusters"
    chart = drawn["loss_weights"]
    assert isinstance(chart, Chart) and not chart.bands
    t = torch.tensor([0, 300, 999])
    expected = loss_weight("min_snr", build_diffusion(experiment).snr(t).double())
    np.testing.assert_allclose([at(chart, each) for each in t.tolist()], expected.numpy())
    assert drawings("--objective.type=vanilla", "--model.routing.type=none")[1] == {}


def test_the_mask_is_that_of_the_network():
    experiment, drawn = drawings()
    mask, routing = drawn["routing"], experiment.model.routing
    assert isinstance(mask, Mask)
    width = mask.used.shape[1]
    expected = routing_mask("dtr", 1000, width, routing.alpha, routing.beta, block=0)
    np.testing.assert_array_equal(mask.used, expected.numpy())
