import numpy as np
import pytest
import torch
from torch import nn

from dtr_scale.diffusion.clusters import affinity_clusters
from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.errors import EvaluationError
from dtr_scale.jobs.network import build_model
from dtr_scale.objectives.affinity import gradient_affinity
from dtr_scale.randomness import keyed_generator

T = 20
DIFFUSION = GaussianDiffusion("cosine", T)


class TwoTasks(nn.Module):
    """A network with one layer for t < 13 and another from there on."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x, t, y, step=None):
        return torch.where((t < 13).view(-1, 1, 1, 1), self.low(x), self.high(x))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return TwoTasks()


def batches(num=6, size=6):
    generator = torch.Generator().manual_seed(1)
    x_start = torch.randn(num, 1, 4, 4, generator=generator)
    y = torch.arange(num) % 3
    return zip(x_start.split(size), y.split(size), strict=True)


def flat_gradient(network, time, seed):
    """The gradient of the mean loss of all samples at one timestep, by backward()."""
    ((x_start, y),) = batches()
    noise = [
        keyed_generator(seed, "affinity_noise", sample, time).standard_normal((1, 4, 4), np.float32)
        for sample in range(len(y))
    ]
    noise, t = torch.tensor(np.stack(noise)), torch.full_like(y, time)
    x_t = DIFFUSION.q_sample(x_start, t, noise)
    terms = DIFFUSION.loss_terms(network(x_t, t, y), x_start=x_start, x_t=x_t, t=t, noise=noise)
    (terms["mse"] + terms["vb"]).mean().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    network.zero_grad()
    return gradient


def test_timesteps_that_share_no_weights_have_no_affinity(network):
    affinity = gradient_affinity(network, DIFFUSION, batches(), range(T))
    assert (affinity.shape, affinity.dtype) == ((T, T), np.float64)
    np.testing.assert_allclose(affinity, affinity.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(affinity), 1)
    assert np.abs(affinity).max() <= 1 + 1e-12
    assert not affinity[:13, 13:].any()
    assert affinity[11, 12] > 0.5
    assert affinity_clusters(affinity, 2).tolist() == [0, 13, T]


def test_it_is_the_cosine_of_the_gradients_of_the_whole_loss():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 2, "input_size": 4}
    network = build_model({"type": "dit", **sizes, "in_channels": 1, "num_classes": 3}, T)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    gradients = [flat_gradient(network, t, seed=5) for t in (3, 17)]
    expected = nn.functional.cosine_similarity(*gradients, dim=0).item()
    assert 0.01 < abs(expected) < 0.99
    for size in (1, 3, 6):
        affinity = gradient_affinity(network, DIFFUSION, batches(size=size), [17, 3], seed=5)
        assert affinity[3, 17] == pytest.approx(expected, rel=1e-4)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_between_measured_timesteps_directions_are_interpolated(network):
    whole = gradient_affinity(network, DIFFUSION, batches(), range(T))
    measured = [2, 6, 12, 13, 17]
    affinity = gradient_affinity(network, DIFFUSION, batches(), measured)
    np.testing.assert_allclose(
        affinity[np.ix_(measured, measured)], whole[np.ix_(measured, measured)]
    )
    np.testing.assert_allclose(np.diag(affinity), 1)
    np.testing.assert_array_equal(affinity[:2], affinity[[2, 2]])
    np.testing.assert_array_equal(affinity[18:], affinity[[17, 17]])
    # Half-way: the cosine of two unit vectors with their mean.
    np.testing.assert_allclose(affinity[4, 2], np.sqrt((1 + whole[2, 6]) / 2), rtol=1e-5)
    assert affinity_clusters(affinity, 2).tolist() == [0, 13, T]


def test_a_gradient_without_direction_is_an_error(network):
    with pytest.raises(EvaluationError, match=r"timestep 4 has norm 0\.0.*give batches"):
        gradient_affinity(network, DIFFUSION, [], [4, 9])
    nn.init.constant_(network.high.weight, torch.inf)
    with pytest.raises(EvaluationError, match="timestep 15 has norm nan"):
        gradient_affinity(network, DIFFUSION, batches(), [4, 15])
