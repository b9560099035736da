from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.objectives.uncertainty import uncertainty_loss

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
CLUSTER = torch.tensor(GOLDEN["t"]) * 8 // 1000


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_loss_and_gradient_equal_the_released_code(schedule):
    log_var = torch.tensor(GOLDEN[f"{schedule}.uw.loss_scale"]).requires_grad_()
    losses = torch.tensor(GOLDEN[f"{schedule}.constant.loss"])
    loss = uncertainty_loss(losses, CLUSTER, log_var)
    loss.backward()
    assert loss.item() == pytest.approx(float(GOLDEN[f"{schedule}.uw.loss"]), rel=1e-5)
    assert log_var.grad is not None
    np.testing.assert_allclose(log_var.grad, GOLDEN[f"{schedule}.uw.grad"], rtol=1e-5)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_the_parts_of_a_batch_sum_to_the_whole(clusters, data):
    cluster, n = torch.tensor(clusters), len(clusters)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    generator = torch.Generator().manual_seed(n)
    losses = torch.rand(n, generator=generator, dtype=torch.float64)
    log_var = torch.randn(4, generator=generator, dtype=torch.float64)
    counts = torch.bincount(cluster, minlength=4)
    parts = [
        uncertainty_loss(losses[a:b], cluster[a:b], log_var, counts)
        for a, b in zip([0, *cuts], [*cuts, n], strict=True)
    ]
    whole = uncertainty_loss(losses, cluster, log_var)
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_an_empty_cluster_gives_neither_term():
    log_var = torch.tensor([0.5, 100.0]).requires_grad_()
    loss = uncertainty_loss(torch.tensor([2.0, 4.0]), torch.tensor([0, 0]), log_var)
    loss.backward()
    expected = 0.5 * (np.exp(-0.5) * 3.0 / 2 + 0.5)  # K = 2
    assert loss.item() == pytest.approx(expected)
    assert log_var.grad is not None
    assert log_var.grad[1] == 0
