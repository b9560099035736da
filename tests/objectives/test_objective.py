import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dtr_scale.errors import ConfigError
from dtr_scale.objectives.objective import AntUwObjective, VanillaObjective, build_objective
from dtr_scale.objectives.uncertainty import uncertainty_loss

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
CPU = torch.device("cpu")
K, B = 4, 10
COUNTS = torch.tensor([3, 0, 5, 2])
CLUSTER = torch.repeat_interleave(torch.arange(K), COUNTS)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, generator=generator), torch.rand(B, generator=generator)


def cluster_means(losses):
    """l_k of a batch; nan for the empty cluster."""
    return torch.zeros(K).index_add(0, CLUSTER, losses) / COUNTS


def ant_uw():
    objective = AntUwObjective(K, lr=0.025, device=CPU)
    objective.log_var.copy_(torch.tensor([0.3, -0.2, -1.0, 0.7]))
    return objective


@pytest.mark.parametrize("objective", [VanillaObjective(B), ant_uw()], ids=["vanilla", "ant_uw"])
def test_shares_and_their_gradients_sum_to_the_objective(objective):
    mse, vb = (term.requires_grad_() for term in batch())
    value = objective.value(cluster_means((mse + vb).detach()), COUNTS)
    gradients = []
    for cuts in ([0, B], [0, 3, 4, B]):
        shares = [
            objective.loss(mse[a:b], vb[a:b], CLUSTER[a:b], COUNTS)
            for a, b in itertools.pairwise(cuts)
        ]
        total = torch.stack(shares).sum()
        assert total.item() == pytest.approx(value, rel=1e-6)
        gradients.append(torch.autograd.grad(total, [mse, vb]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_vanilla_is_the_mean_and_has_nothing_to_learn():
    mse, vb = batch()
    objective = VanillaObjective(B)
    loss = objective.loss(mse, vb, CLUSTER, COUNTS)
    torch.testing.assert_close(loss, (mse + vb).mean())
    objective.update(cluster_means(mse + vb), COUNTS)
    objective.load_state_dict(objective.state_dict())
    assert (objective.state_dict(), objective.metrics()) == ({}, {})


def test_the_gradient_equals_the_released_code():
    cluster = torch.tensor(GOLDEN["t"]) * 8 // 1000
    counts = torch.bincount(cluster, minlength=8)
    losses = torch.tensor(GOLDEN["cosine.constant.loss"])
    means = torch.zeros(8).index_add(0, cluster, losses) / counts
    objective = AntUwObjective(8, lr=0.025, device=CPU)
    objective.log_var.copy_(torch.tensor(GOLDEN["cosine.uw.loss_scale"]))
    value = objective.value(means, counts)
    assert value == pytest.approx(float(GOLDEN["cosine.uw.loss"]), rel=1e-5)
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
    assert set(objective.metrics()) == {f"uw_log_var_{k}" for k in range(K)}


def test_log_variances_settle_at_the_logarithm_of_the_loss():
    objective = AntUwObjective(K, lr=0.025, device=CPU)
    means = torch.tensor([0.5, 1.0, 2.0, 4.0])
    for _ in range(600):
        objective.update(means, torch.ones(K))
    torch.testing.assert_close(objective.log_var, (means / K).log(), rtol=0, atol=0.02)


def test_the_network_loss_leaves_the_log_variances_alone():
    objective = ant_uw()
    mse, vb = (term.requires_grad_() for term in batch())
    objective.loss(mse, vb, CLUSTER, COUNTS).backward()
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
    arguments = {"num_clusters": K, "global_batch_size": B, "lr": 0.025, "device": CPU}
    assert isinstance(build_objective("vanilla", **arguments), VanillaObjective)
    assert isinstance(build_objective("ant_uw", **arguments), AntUwObjective)
    with pytest.raises(ConfigError, match="'antuw' is unknown; accepted: vanilla, ant_uw"):
        build_objective("antuw", **arguments)
