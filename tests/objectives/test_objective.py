import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.errors import ConfigError
from dtr_scale.objectives.objective import (
    OBJECTIVE_TYPES,
    AntUwObjective,
    WeightedObjective,
    build_objective,
)
from dtr_scale.objectives.uncertainty import uncertainty_loss
from dtr_scale.objectives.weighting import loss_weight

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
CPU = torch.device("cpu")
K, B = 4, 10
COUNTS = torch.tensor([3, 0, 5, 2])
CLUSTER = torch.repeat_interleave(torch.arange(K), COUNTS)
SNR = torch.logspace(3, -3, B)
WHOLE = {"snr": SNR, "cluster": CLUSTER, "counts": COUNTS}
LOG_VAR = torch.tensor([0.3, -0.2, -1.0, 0.7])


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, generator=generator), torch.rand(B, generator=generator)


def cluster_means(losses):
    """l_k of a batch; nan for the empty cluster."""
    return torch.zeros(K).index_add(0, CLUSTER, losses) / COUNTS


def ant_uw():
    objective = AntUwObjective(K, lr=0.025, device=CPU)
    objective.log_var.copy_(LOG_VAR)
    return objective


@pytest.mark.parametrize("type", OBJECTIVE_TYPES)
@settings(deadline=None, max_examples=30)
@given(st.permutations(range(B)), st.lists(st.integers(0, B), max_size=4))
def test_shares_and_their_gradients_sum_to_the_objective_however_split(type, order, cuts):
    objective = ant_uw() if type == "ant_uw" else WeightedObjective(B, type)
    mse, vb = (term.requires_grad_() for term in batch())
    whole = objective.loss(mse, vb, **WHOLE)
    expected = torch.autograd.grad(whole, [mse, vb])
    shares = 0.0
    for a, b in itertools.pairwise([0, *sorted(cuts), B]):
        part = order[a:b]
        share = objective.loss(
            mse[part], vb[part], snr=SNR[part], cluster=CLUSTER[part], counts=COUNTS
        )
        share.backward()
        shares += share.item()
    assert shares == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close((mse.grad, vb.grad), expected)


def test_vanilla_is_the_mean():
    mse, vb = batch()
    loss = WeightedObjective(B).loss(mse, vb, **WHOLE)
    torch.testing.assert_close(loss, (mse + vb).mean())


@pytest.mark.parametrize(("type", "gamma", "k"), [("min_snr", 3.0, 1.0), ("p2", 0.5, 2.0)])
def test_min_snr_and_p2_weight_the_mse_alone(type, gamma, k):
    mse, vb = batch()
    loss = WeightedObjective(B, type, gamma=gamma, k=k).loss(mse, vb, **WHOLE)
    weight = loss_weight(type, SNR, gamma=gamma, k=k)
    assert weight.min() < 0.1
    torch.testing.assert_close(loss, (weight * mse + vb).mean())


def test_ant_uw_is_the_sum_over_the_clusters_that_have_samples():
    mse, vb = batch()
    terms = torch.exp(-LOG_VAR) * cluster_means(mse + vb) / K + LOG_VAR
    torch.testing.assert_close(ant_uw().loss(mse, vb, **WHOLE), terms[COUNTS > 0].sum() / 2)


def test_a_weighting_has_nothing_to_learn():
    mse, vb = batch()
    objective = WeightedObjective(B)
    objective.update(cluster_means(mse + vb), COUNTS)
    objective.load_state_dict(objective.state_dict())
    assert (objective.state_dict(), objective.metrics()) == ({}, {})


def test_the_gradient_equals_the_released_code():
    cluster = torch.tensor(GOLDEN["t"]) * 8 // 1000
    counts = torch.bincount(cluster, minlength=8)
    mse, vb = (torch.tensor(GOLDEN[f"cosine.constant.{name}"]) for name in ("mse", "vb"))
    means = torch.zeros(8).index_add(0, cluster, mse + vb) / counts
    objective = AntUwObjective(8, lr=0.025, device=CPU)
    objective.log_var.copy_(torch.tensor(GOLDEN["cosine.uw.loss_scale"]))
    loss = objective.loss(mse, vb, snr=torch.ones(16), cluster=cluster, counts=counts)
    assert loss.item() == pytest.approx(float(GOLDEN["cosine.uw.loss"]), rel=1e-5)
    objective.update(means, counts)
    assert objective.log_var.grad is not None
    np.testing.assert_allclose(objective.log_var.grad, GOLDEN["cosine.uw.grad"], rtol=1e-5)


def test_updates_are_those_of_adamw_on_the_differentiated_objective():
    objective = AntUwObjective(K, lr=0.025, device=CPU)
    log_var = torch.zeros(K, requires_grad=True)
    adamw = torch.optim.AdamW([log_var], lr=0.025, weight_decay=0.0)
    for step in range(5):
        losses = sum(batch(step), torch.zeros(B))
        objective.update(cluster_means(losses), COUNTS)
        adamw.zero_grad()
        uncertainty_loss(losses, CLUSTER, log_var).backward()
        adamw.step()
    torch.testing.assert_close(objective.log_var, log_var.detach())
    assert objective.log_var[1] == 0  # no sample ever came from cluster 1
    assert objective.metrics()["uw_log_var"].shape == (K,)


def test_log_variances_settle_at_the_logarithm_of_the_loss():
    objective = AntUwObjective(K, lr=0.025, device=CPU)
    means = torch.tensor([0.5, 1.0, 2.0, 4.0])
    for _ in range(600):
        objective.update(means, torch.ones(K))
    torch.testing.assert_close(objective.log_var, (means / K).log(), rtol=0, atol=0.02)


def test_the_network_loss_leaves_the_log_variances_alone():
    objective = ant_uw()
    mse, vb = (term.requires_grad_() for term in batch())
    objective.loss(mse, vb, **WHOLE).backward()
    assert objective.log_var.grad is None


def test_a_restored_objective_continues_bit_for_bit():
    original = ant_uw()
    for step in range(3):
        original.update(cluster_means(batch(step)[0]), COUNTS)
    state = original.state_dict()
    assert state.keys() == {"log_var", "exp_avg", "exp_avg_sq", "step"}
    assert all(value.dtype == torch.float32 for value in state.values())
    restored = AntUwObjective(K, lr=0.025, device=CPU)
    restored.load_state_dict(state)
    for step in range(3, 6):
        for objective in (original, restored):
            objective.update(cluster_means(batch(step)[0]), COUNTS)
    for name, value in original.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)
    assert state["step"] == 3  # a saved state is a copy


def test_objectives_are_built_by_name():
    arguments = {"num_clusters": K, "global_batch_size": B, "device": CPU}
    mse, vb = batch()
    losses = {
        type: build_objective(type, **arguments, gamma=2.0, k=3.0).loss(mse, vb, **WHOLE)
        for type in OBJECTIVE_TYPES
    }
    expected = {
        type: (loss_weight(type, SNR, gamma=2.0, k=3.0) * mse + vb).mean()
        for type in ("vanilla", "min_snr", "p2")
    }
    expected["ant_uw"] = uncertainty_loss(mse + vb, CLUSTER, torch.zeros(K))
    torch.testing.assert_close(losses, expected)
    with pytest.raises(ConfigError, match="'antuw': unknown; give one of vanilla, min_snr, p2, a"):
        build_objective("antuw", **arguments)
