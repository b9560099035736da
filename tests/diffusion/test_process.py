from pathlib import Path

import numpy as np
import pytest
import torch

from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.errors import ConfigError

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
X_START, NOISE = torch.tensor(GOLDEN["x0"]), torch.tensor(GOLDEN["noise"])
MODEL_OUTPUT, T = torch.tensor(GOLDEN["model_output"]), torch.tensor(GOLDEN["t"])


def loss_terms(diffusion, model_output):
    x_t = diffusion.q_sample(X_START, T, NOISE)
    return diffusion.loss_terms(model_output, x_start=X_START, x_t=x_t, t=T, noise=NOISE)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_losses_equal_the_released_code(schedule):
    diffusion = GaussianDiffusion(schedule)
    x_t = diffusion.q_sample(X_START, T, NOISE)
    np.testing.assert_allclose(x_t, GOLDEN[f"{schedule}.xt"], rtol=1e-5, atol=1e-6)
    seen = []

    def model_fn(x_t, t):
        seen.extend([x_t, t])
        return MODEL_OUTPUT

    terms = loss_terms(diffusion, MODEL_OUTPUT)
    losses = diffusion.training_losses(model_fn, X_START, T, NOISE)
    assert torch.equal(seen[0], x_t)
    assert torch.equal(seen[1], T)
    assert (T == 0).any()  # the decoder's likelihood is among the terms
    for name in ("mse", "vb"):
        np.testing.assert_allclose(terms[name], GOLDEN[f"{schedule}.constant.{name}"], rtol=1e-5)
        assert torch.equal(losses[name], terms[name])


def test_snr_gives_the_released_min_snr_weights():
    for schedule in ("linear", "cosine"):
        snr = GaussianDiffusion(schedule).snr(T)
        weight = snr.clamp(max=5) / snr
        expected = GOLDEN[f"{schedule}.min_snr_5.mse"] / GOLDEN[f"{schedule}.constant.mse"]
        np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_the_bound_trains_the_variance_alone():
    output = MODEL_OUTPUT.clone().requires_grad_()
    loss_terms(GaussianDiffusion(), output)["vb"].sum().backward()
    assert output.grad is not None
    assert not output.grad[:, :4].any()
    assert output.grad[:, 4:].flatten(1).any(dim=1).all()


def test_the_bound_is_zero_for_the_true_posterior():
    diffusion = GaussianDiffusion()
    true_posterior = torch.cat([NOISE, -torch.ones_like(NOISE)], dim=1)
    vb = loss_terms(diffusion, true_posterior)["vb"]
    assert vb[T > 0].abs().max() < 1e-5
    assert vb[T == 0] > 0


def test_without_learned_sigma_there_is_no_bound():
    diffusion = GaussianDiffusion(learn_sigma=False)
    terms = loss_terms(diffusion, MODEL_OUTPUT[:, :4])
    np.testing.assert_allclose(terms["mse"], GOLDEN["cosine.constant.mse"], rtol=1e-5)
    assert not terms["vb"].any()
    p = diffusion.p_mean_variance(MODEL_OUTPUT[:, :4], X_START, T)
    np.testing.assert_allclose(p.variance[1:, 0, 0, 0], diffusion.betas[T[1:]], rtol=1e-5)


def test_losses_are_fp32_whatever_the_model_computes_in():
    terms = loss_terms(GaussianDiffusion(), MODEL_OUTPUT.bfloat16())
    for name, value in terms.items():
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value, GOLDEN[f"cosine.constant.{name}"], rtol=0.05)


def test_respacing_keeps_the_noise_levels_of_the_kept_timesteps():
    full, respaced = GaussianDiffusion(), GaussianDiffusion(timestep_respacing="50")
    assert respaced.num_timesteps == len(respaced.betas) == 50
    np.testing.assert_allclose(
        np.cumprod(1 - respaced.betas), full.alphas_cumprod[respaced.timestep_map], rtol=1e-9
    )
    assert torch.equal(
        respaced.snr(torch.arange(50)), full.snr(torch.tensor(respaced.timestep_map))
    )


def test_variance_lies_between_the_posterior_and_beta():
    diffusion = GaussianDiffusion()
    t = torch.tensor([1, 500, 999])
    eps = torch.zeros(3, 4, 2, 2)
    low, high = (
        diffusion.p_mean_variance(torch.cat([eps, sigma * torch.ones_like(eps)], 1), eps, t)
        for sigma in (-1.0, 1.0)
    )
    abar = diffusion.alphas_cumprod
    posterior = (1 - abar[t - 1]) / (1 - abar[t]) * diffusion.betas[t]
    np.testing.assert_allclose(low.variance[:, 0, 0, 0], posterior, rtol=1e-5)
    np.testing.assert_allclose(high.variance[:, 0, 0, 0], diffusion.betas[t], rtol=1e-5)


def test_clipping_cuts_the_predicted_picture():
    x_t = torch.full((2, 4, 2, 2), 3.0)
    p = GaussianDiffusion().p_mean_variance(
        torch.zeros(2, 8, 2, 2), x_t, torch.tensor([5, 900]), clip_denoised=True
    )
    assert torch.equal(p.pred_xstart, torch.ones_like(x_t))


def test_one_timestep_is_too_few():
    with pytest.raises(ConfigError, match="keep at least 2"):
        GaussianDiffusion(timestep_respacing="1")
