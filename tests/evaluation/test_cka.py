"""Linear CKA has the properties of its paper, and compares what a network's blocks give out."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.errors import ConfigError, EvaluationError
from dtr_scale.evaluation.cka import linear_cka, timestep_cka
from dtr_scale.jobs.network import build_model
from dtr_scale.randomness import keyed_generator
from tests.support import weights

TIMESTEPS = [0, 30, 99]
DIT = weights.CONFIG | {"routing": {"type": "dtr"}}
ADM = weights.ADM | {"in_channels": 4, "num_classes": 10}

seeds, widths, counts = st.integers(0, 2**31), st.integers(1, 40), st.integers(4, 20)


def features(seed, n, width):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def orthogonal(seed, width):
    return torch.linalg.qr(features(seed, width, width).double()).Q


def network_of(config):
    """A network whose output is not yet zero and whose blocks are not the identity."""
    torch.manual_seed(0)
    network = build_model(config, num_timesteps=100).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def cka_of(network, *, n=6, timesteps=TIMESTEPS, seed=7, step=None):
    diffusion = GaussianDiffusion("cosine", 100, learn_sigma=True)
    x_start = features(1, n, 4 * 8 * 8).view(n, 4, 8, 8)
    y = torch.arange(n)
    return timestep_cka(network, diffusion, x_start, y, timesteps, seed=seed, step=step)


@given(seeds, counts, widths, widths, st.booleans())
def test_it_is_symmetric_and_at_most_1(seed, n, p, q, debiased):
    x, y = features(seed, n, p), features(seed + 1, n, q)
    cka = linear_cka(x, y, debiased=debiased)
    assert (-1 if debiased else 0) <= cka <= 1
    assert linear_cka(y, x, debiased=debiased) == pytest.approx(cka, abs=1e-12)
    assert linear_cka(x, x, debiased=debiased) == pytest.approx(1, abs=1e-12)


@given(seeds, counts, widths, st.floats(1e-3, 1e3), st.floats(-100, 100), st.booleans())
def test_rotation_scale_and_shift_do_not_matter(seed, n, p, scale, shift, debiased):
    x, y = features(seed, n, p).double(), features(seed + 1, n, 5)
    turned = scale * (x @ orthogonal(seed + 2, p)) + shift
    assert linear_cka(turned, x, debiased=debiased) == pytest.approx(1, abs=1e-7)
    expected = linear_cka(x, y, debiased=debiased)
    assert linear_cka(turned, y, debiased=debiased) == pytest.approx(expected, abs=1e-7)


@given(seeds, counts, widths, widths)
def test_gram_matrices_give_what_features_give(seed, n, p, q):
    x, y = (features(seed + i, n, width).double() for i, width in enumerate((p, q)))
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    numerator = (centred_y.T @ centred_x).norm() ** 2
    expected = numerator / ((centred_x.T @ centred_x).norm() * (centred_y.T @ centred_y).norm())
    assert linear_cka(x, y) == pytest.approx(float(expected), abs=1e-9)


@given(seeds, st.integers(4, 7), widths, widths)
def test_debiased_is_the_mean_over_samples_that_are_all_different(seed, n, p, q):
    """HSIC as Song et al. define it, a mean over all ordered quadruples."""
    x, y = (features(seed + i, n, width).double() for i, width in enumerate((p, q)))
    four = torch.tensor(list(itertools.permutations(range(n), 4))).T
    i, j, k, l = four  # noqa: E741

    def hsic(a, b):
        a, b = a @ a.T, b @ b.T
        return (a[i, j] * (b[i, j] + b[k, l] - 2 * b[i, k])).mean()

    scale = (hsic(x, x) * hsic(y, y)).sqrt()
    assert linear_cka(x, y, debiased=True) == pytest.approx(float(hsic(x, y) / scale), abs=1e-7)


def test_wide_features_look_alike_unless_debiased():
    x, y = features(0, 64, 20_000), features(1, 64, 20_000)
    assert linear_cka(x, y) == pytest.approx(0.997, abs=1e-3)
    assert abs(linear_cka(x, y, debiased=True)) < 0.05


def test_features_that_share_nothing_are_not_alike():
    x = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    y = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert linear_cka(x, y) == 0
    assert linear_cka(torch.cat([x, y], 1), y) == pytest.approx(2**-0.5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((4, 3), 0.1), "differ between samples"),
        (torch.full((4, 3), float("nan")), "finite"),
        (torch.randn(5, 3), r"features \[5, 3\] with \[4, 2\]"),
    ],
)
def test_what_cannot_be_compared_is_refused(x, message):
    with pytest.raises(EvaluationError, match=message):
        linear_cka(x, torch.randn(4, 2))


def test_too_few_samples_are_refused():
    for n in (1, 2, 3):
        with pytest.raises(EvaluationError, match="at least 4 samples"):
            linear_cka(features(0, n, 2), features(1, n, 3), debiased=True)
    with pytest.raises(EvaluationError, match="at least 2 samples"):
        linear_cka(features(0, 1, 2), features(1, 1, 3))


def test_timesteps_are_compared_by_each_blocks_outputs():
    """Against linear_cka of outputs taken by hand."""
    network, n = network_of(DIT), 6
    cka = cka_of(network, n=n)
    assert (cka.shape, cka.dtype) == ((3, 3, 3), torch.float32)
    noise = torch.stack(
        [
            torch.tensor(keyed_generator(7, "cka.noise", i).standard_normal((4, 8, 8), "float32"))
            for i in range(n)
        ]
    )
    x_start, outputs = features(1, n, 4 * 8 * 8).view(n, 4, 8, 8), {}
    diffusion = GaussianDiffusion("cosine", 100, learn_sigma=True)
    block = network.routed_blocks()[1]
    for timestep in TIMESTEPS:
        t = torch.full((n,), timestep)
        keep = block.register_forward_hook(lambda *args, t=timestep: outputs.update({t: args[2]}))
        with torch.no_grad():
            network(diffusion.q_sample(x_start, t, noise), t, torch.arange(n))
        keep.remove()
    for i, first in enumerate(TIMESTEPS):
        for j, second in enumerate(TIMESTEPS):
            pair = outputs[first].flatten(1), outputs[second].flatten(1)
            expected = linear_cka(*pair, debiased=True)
            assert float(cka[1, i, j]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("config", "depth"),
    [(DIT, 3), (ADM, 12), (DIT | {"num_experts": 2}, 3)],
    ids=["dit", "adm", "experts"],
)
def test_any_network_can_be_compared(config, depth):
    network = network_of(config)
    cka = cka_of(network)
    assert len(cka) == depth
    assert torch.equal(cka.diagonal(dim1=1, dim2=2), torch.ones(depth, 3))
    assert torch.allclose(cka, cka.mT)
    assert (cka[:, 0, 2] < 0.99).all()  # 0 and 99: other noise levels, and other masks
    assert not any(block._forward_hooks for block in network.routed_blocks())
    assert torch.equal(cka_of(network), cka)
    assert not torch.equal(cka_of(network, seed=8), cka)


def test_masks_that_change_in_training_are_those_of_a_step():
    network = network_of(DIT | {"routing": {"type": "max_roaming", "update_every_steps": 10}})
    assert not torch.equal(cka_of(network, step=0), cka_of(network, step=10))
    with pytest.raises(ConfigError, match="at every training step"):
        cka_of(network)
    assert not any(block._forward_hooks for block in network.routed_blocks())
