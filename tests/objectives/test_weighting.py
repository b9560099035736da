from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.errors import ConfigError
from dtr_scale.objectives.weighting import loss_weight

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
T = torch.tensor(GOLDEN["t"])
snrs = st.floats(1e-30, 1e30)
gammas = st.floats(0.01, 100.0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("gamma", [1, 5])
def test_min_snr_weights_the_mse_alone_as_the_released_code(schedule, gamma):
    mse, vb = (torch.tensor(GOLDEN[f"{schedule}.constant.{name}"]) for name in ("mse", "vb"))
    weight = loss_weight("min_snr", GaussianDiffusion(schedule).snr(T), gamma=float(gamma))
    released = f"{schedule}.min_snr_{gamma}"
    np.testing.assert_allclose(weight * mse, GOLDEN[f"{released}.mse"], rtol=1e-6)
    np.testing.assert_allclose(weight * mse + vb, GOLDEN[f"{released}.loss"], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_p2_equals_the_released_code_at_every_timestep(schedule, gamma):
    diffusion = GaussianDiffusion(schedule)
    expected = GOLDEN[f"{schedule}.p2_k1.0_g{gamma}.weight"]
    weight = loss_weight("p2", diffusion.snr(torch.arange(1000)), k=1.0, gamma=gamma)
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    exact = torch.tensor(diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod))
    np.testing.assert_allclose(loss_weight("p2", exact, gamma=gamma), expected, rtol=1e-13)


def test_gamma_is_5_for_min_snr_and_1_for_p2_unless_given():
    snr = torch.tensor([0.5, 3.0, 40.0])
    assert torch.equal(loss_weight("min_snr", snr), loss_weight("min_snr", snr, gamma=5.0))
    assert torch.equal(loss_weight("p2", snr), loss_weight("p2", snr, k=1.0, gamma=1.0))
    assert loss_weight("p2", snr, k=2.0, gamma=2.0)[0] == 1 / 2.5**2


@given(snrs, gammas)
def test_min_snr_weighs_the_same_error_of_epsilon_x0_and_v(value, gamma):
    """With |eps|^2 = SNR |x0|^2 and |v|^2 = (SNR + 1) |x0|^2 for the errors of one output."""
    snr = torch.tensor([value], dtype=torch.float64)
    epsilon, x0, v = (
        loss_weight("min_snr", snr, gamma=gamma, prediction=name) for name in ("epsilon", "x0", "v")
    )
    torch.testing.assert_close(x0, snr.clamp(max=gamma))
    torch.testing.assert_close(epsilon * snr, x0)
    torch.testing.assert_close(v * (snr + 1), x0)


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [("min_snr", "epsilon"), ("min_snr", "x0"), ("min_snr", "v"), ("p2", "epsilon")],
)
def test_weights_and_their_gradients_are_finite_at_any_snr(kind, prediction):
    snr = torch.tensor([0.0, 1e-45, 1e-38, 1.0, 3e38, torch.inf], requires_grad=True)
    weight = loss_weight(kind, snr, prediction=prediction)
    assert (weight.shape, weight.dtype) == (snr.shape, torch.float32)
    assert weight.isfinite().all()
    (gradient,) = torch.autograd.grad(weight.sum(), snr)
    assert gradient.isfinite().all()


def test_min_snr_is_one_at_no_signal_and_has_its_limits_at_no_noise():
    ends = torch.tensor([0.0, torch.inf])
    limits = {"epsilon": [1.0, 0.0], "x0": [1.0, 5.0], "v": [1.0, 0.0]}
    for prediction, expected in limits.items():
        assert loss_weight("min_snr", ends, prediction=prediction).tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "minsnr"},
            "objective.type = 'minsnr': unknown; give one of vanilla, min_snr, p2",
        ),
        ({"prediction": "eps"}, "prediction = 'eps': unknown; give one of epsilon, x0, v"),
        ({"kind": "p2", "prediction": "v"}, "prediction = 'v': unknown; give one of epsilon$"),
        ({"gamma": 0.0}, "objective.gamma = 0.0: not accepted; give a finite number above 0"),
        ({"kind": "p2", "gamma": -1.0}, "objective.gamma = -1.0: not accepted"),
        ({"gamma": float("inf")}, "objective.gamma = inf: not accepted"),
        ({"kind": "p2", "k": 0.0}, "objective.k = 0.0: not accepted"),
    ],
)
def test_what_is_not_accepted_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        loss_weight(**{"kind": "min_snr", "snr": torch.ones(1)} | arguments)


def test_what_a_kind_does_not_use_has_no_effect():
    snr = torch.rand(4)
    assert torch.equal(loss_weight("vanilla", snr, gamma=-1.0, k=0.0), torch.ones(4))
    assert torch.equal(loss_weight("min_snr", snr, k=-1.0), loss_weight("min_snr", snr))
