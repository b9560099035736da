from pathlib import Path

import numpy as np
import pytest
import torch

from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.diffusion.samplers import ddim_sample, ddpm_sample, dpm_solver_sample
from dtr_scale.errors import ConfigError

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


class AncestralReference:
    """DDPM with the posterior's variance (Ho et al., algorithm 2), in float64, for eps = x / 2."""

    def __init__(self, schedule):
        self.betas = GaussianDiffusion(schedule).betas
        self.alphas = 1 - self.betas
        bars = np.cumprod(self.alphas)
        self.sqrt_bars = np.sqrt(1 - bars)
        self.sigmas = np.sqrt((1 - np.append(1.0, bars[:-1])) / (1 - bars) * self.betas)

    def sample(self, x, noise):
        for i, t in enumerate(range(999, -1, -1)):
            x = (x - self.betas[t] / self.sqrt_bars[t] * x / 2) / self.alphas[t] ** 0.5
            x = x + self.sigmas[t] * noise[i].double()  # sigma is 0 at t = 0
        return x


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_with_eta_1_on_all_timesteps_is_ddpm_by_its_formula(schedule):
    noise = torch.randn(1000, *X_T.shape, generator=torch.Generator().manual_seed(0))
    diffusion = GaussianDiffusion(schedule, learn_sigma=False)
    actual = ddim_sample(lambda x, t: x / 2, diffusion, X_T, eta=1.0, noise=noise)
    expected = AncestralReference(schedule).sample(X_T.double(), noise)
    assert (actual - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_eta_scales_the_posterior_standard_deviation(schedule, eta):
    """Sample i is given unit noise at step i alone: what arrives at step i + 1 is that sigma."""
    arrived = []

    def model_fn(x, t):
        arrived.append(x[len(arrived) - 1].item())
        return torch.zeros_like(x)

    noise = torch.eye(1000).view(1000, 1000, 1, 1, 1)
    diffusion = GaussianDiffusion(schedule, learn_sigma=False)
    ddim_sample(model_fn, diffusion, torch.zeros(1000, 1, 1, 1), eta=eta, noise=noise)
    expected = eta * AncestralReference(schedule).sigmas[:0:-1]
    np.testing.assert_allclose(arrived[1:], expected, rtol=2e-3)


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


def test_ddim_without_eta_asks_for_no_noise():
    class NoNoise:
        def __getitem__(self, index):
            raise AssertionError

    diffusion = GaussianDiffusion(timestep_respacing="3")
    plain = ddim_sample(toy_model, diffusion, X_T)
    assert torch.equal(ddim_sample(toy_model, diffusion, X_T, noise=NoNoise()), plain)


def test_ddim_with_eta_needs_noise():
    with pytest.raises(ConfigError, match="needs a source of noise"):
        ddim_sample(toy_model, GaussianDiffusion(), X_T, eta=0.5)


def distance(sample, target):
    """The distance of two batches relative to the target."""
    return float((sample - target).norm() / target.norm())


@pytest.fixture(scope="module", params=["linear", "cosine"])
def solved(request):
    """A schedule, and the toy network's samples with it after 1,000 steps."""
    return request.param, dpm_solver_sample(toy_model, GaussianDiffusion(request.param), X_T)


def test_dpm_solver_on_all_timesteps_agrees_with_ddim(solved):
    schedule, solution = solved
    # What is left is DDIM's own error: the toy network is no denoiser and blows up at a log SNR
    # of -20, where the cosine schedule starts.
    bound = {"linear": 5e-3, "cosine": 3e-2}[schedule]
    assert distance(ddim_sample(toy_model, GaussianDiffusion(schedule), X_T), solution) < bound


@pytest.mark.parametrize("steps", ["20", "35", "50"])
def test_dpm_solver_is_nearer_to_the_solution_than_ddim(solved, steps):
    schedule, solution = solved
    diffusion = GaussianDiffusion(schedule, timestep_respacing=steps)
    by_solver = distance(dpm_solver_sample(toy_model, diffusion, X_T), solution)
    by_ddim = distance(ddim_sample(toy_model, diffusion, X_T), solution)
    assert by_solver < by_ddim / {"linear": 30, "cosine": 1}[schedule]


class Mixture:
    """The exact network for pictures whose values are near -0.6 or 0.6 (standard deviation 0.2)."""

    def __init__(self, schedule):
        self.alphas_cumprod = torch.tensor(GaussianDiffusion(schedule).alphas_cumprod)

    def __call__(self, x, t):
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        spread = 0.04 * abar + 1 - abar
        mean = 0.6 * abar.sqrt() * torch.tanh(0.6 * abar.sqrt() * x.double() / spread)
        return ((1 - abar).sqrt() * (x.double() - mean) / spread).float()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_dpm_solver_converges_to_second_order(schedule):
    def errors(sample):
        def draw(steps):
            return sample(model, GaussianDiffusion(schedule, 1000, steps, learn_sigma=False), x_T)

        return [distance(draw(steps), solution) for steps in ("20", "40", "80", "160")]

    model = Mixture(schedule)
    x_T = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    solution = dpm_solver_sample(model, GaussianDiffusion(schedule, learn_sigma=False), x_T)
    by_solver, by_ddim = errors(dpm_solver_sample), errors(ddim_sample)
    assert all(a < b for a, b in zip(by_solver, by_ddim, strict=True))
    orders = [np.log2(errors[1] / errors[3]) / 2 for errors in (by_solver, by_ddim)]
    assert orders[0] > 1.7
    assert orders[1] == pytest.approx(1.0, abs=0.15)


def test_the_last_step_of_dpm_solver_returns_the_estimate_of_x_0():
    diffusion, estimates = GaussianDiffusion(timestep_respacing="4"), []

    def model_fn(x, t):
        output = toy_model(x, t)
        index = torch.tensor([int(np.searchsorted(diffusion.timestep_map, int(t[0])))])
        estimates.append(diffusion.p_mean_variance(output, x, index).pred_xstart)
        return output

    assert torch.equal(dpm_solver_sample(model_fn, diffusion, X_T), estimates[-1])


@pytest.mark.parametrize("steps", ["2", "3", "4", "10", ""])
def test_dpm_solver_is_finite_and_deterministic_from_almost_pure_noise(steps):
    diffusion = GaussianDiffusion("cosine", timestep_respacing=steps)
    assert np.log(diffusion.alphas_cumprod[-1]) < -19
    sample = dpm_solver_sample(toy_model, diffusion, X_T, clip_denoised=True)
    assert sample.dtype == torch.float32
    assert sample.abs().max() <= 1
    assert torch.equal(dpm_solver_sample(toy_model, diffusion, X_T, clip_denoised=True), sample)
    assert dpm_solver_sample(toy_model, diffusion, X_T.half()).isfinite().all()
