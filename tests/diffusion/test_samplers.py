from pathlib import Path

import numpy as np
import pytest
import torch

from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.diffusion.samplers import ddim_sample, ddpm_sample

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers.npz")
A, X_T = torch.tensor(GOLDEN["A"]), torch.tensor(GOLDEN["z"])


def toy_model(x, t):
    """The network that the golden samples were drawn with: tanh of a mix of channels."""
    gain = (0.5 + 0.5 * t / 1000).view(-1, 1, 1, 1)
    out = torch.tanh(gain * torch.einsum("oc,nchw->nohw", A, x))
    eps, sigma = out.chunk(2, dim=1)
    return torch.cat([eps + 0.5 * x, sigma], dim=1)


def assert_close(actual, expected):
    """Equal to 1e-5 of the largest value."""
    expected = torch.as_tensor(expected)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", ["50", "250"])
def test_samples_equal_the_released_code(schedule, steps):
    diffusion = GaussianDiffusion(schedule, timestep_respacing=steps)
    case = f"{schedule}.{steps}"
    np.testing.assert_allclose(diffusion.betas, GOLDEN[f"{case}.betas"], rtol=1e-9)
    noise = torch.tensor(GOLDEN[f"{case}.ddpm_noise"])
    assert_close(ddpm_sample(toy_model, diffusion, X_T, noise), GOLDEN[f"{case}.ddpm"])
    assert_close(ddim_sample(toy_model, diffusion, X_T), GOLDEN[f"{case}.ddim"])


def test_the_network_is_given_original_timesteps_from_last_to_first():
    diffusion, asked = GaussianDiffusion(timestep_respacing="5"), []

    def model_fn(x, t):
        asked.append(t.tolist())
        return toy_model(x, t)

    ddim_sample(model_fn, diffusion, X_T)
    assert asked == [[t, t] for t in (999, 749, 500, 250, 0)]


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance():
    diffusion = GaussianDiffusion("linear", timestep_respacing="20")
    noise = torch.randn(20, *X_T.shape, generator=torch.Generator().manual_seed(0))

    def model_fn(x, t):
        eps = toy_model(x, t)[:, :4]
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)

    expected = ddpm_sample(model_fn, diffusion, X_T, noise)
    actual = ddim_sample(model_fn, diffusion, X_T, eta=1.0, noise=noise)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_network_that_knows_the_noise_leads_back_to_the_picture():
    diffusion = GaussianDiffusion(timestep_respacing="10", learn_sigma=False)
    x_start = torch.rand(2, 4, 4, 4) * 2 - 1

    def model_fn(x, t):
        index = int(np.searchsorted(diffusion.timestep_map, int(t[0])))
        abar = diffusion.alphas_cumprod[index]
        return (x - abar**0.5 * x_start) / (1 - abar) ** 0.5

    x_0 = ddim_sample(model_fn, diffusion, X_T, clip_denoised=True)
    torch.testing.assert_close(x_0, x_start, rtol=0, atol=1e-3)


def test_any_indexable_is_a_noise_source_and_the_last_step_needs_none():
    diffusion, asked = GaussianDiffusion(timestep_respacing="3"), []

    class Recorder:
        def __getitem__(self, index):
            asked.append(index)
            return torch.zeros_like(X_T)

    ddpm_sample(toy_model, diffusion, X_T, Recorder())
    assert asked == [0, 1]


def test_progress_wraps_the_steps():
    seen = []

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    diffusion = GaussianDiffusion(timestep_respacing="3")
    ddim_sample(toy_model, diffusion, X_T, progress=progress)
    assert seen == [0, 1, 2]


def test_ddim_with_eta_needs_noise():
    with pytest.raises(ValueError, match="needs noise"):
        ddim_sample(toy_model, GaussianDiffusion(), X_T, eta=0.5)
