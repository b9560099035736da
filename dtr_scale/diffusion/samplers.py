"""Draw x_0 from noise: DDPM (ancestral), DDIM and DPM-Solver++."""

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dtr_scale.diffusion.process import GaussianDiffusion, PosteriorEstimate
from dtr_scale.errors import ConfigError

ModelFn = Callable[[Tensor, Tensor], Tensor]
"""(x [N, C, H, W], original timestep int [N]) -> [N, 2C or C, H, W]."""


class NoiseSource(Protocol):
    """Noise by sampling step: source[i] is [N, C, H, W] for the i-th step taken."""

    def __getitem__(self, index: int, /) -> Tensor: ...


Progress = Callable[[Iterable[int]], Iterable[int]]

# The cosine schedule starts at -20, where a small error of eps is a large one of x_0; diffusers
# advises to go no lower than -5.1 in half of it.
_DIMMEST_LOG_SNR = -10.2


@torch.no_grad()
def ddpm_sample(
    model_fn: ModelFn,
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    noise: NoiseSource,
    clip_denoised: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Return x_0 [N, C, H, W], fp32, by ancestral sampling (Ho et al., 2020, algorithm 2).

    `noise[i]` is used by the i-th step taken; the last step adds none and does not ask for it.
    `progress` wraps the loop, e.g. tqdm.
    """
    x, last = x_T.float(), diffusion.num_timesteps - 1
    for i in _steps(diffusion, progress):
        p = _estimate(model_fn, diffusion, x, last - i, clip_denoised)
        x = p.mean
        if i < last:
            x = x + torch.exp(0.5 * p.log_variance) * noise[i]
    return x


@torch.no_grad()
def ddim_sample(
    model_fn: ModelFn,
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    eta: float = 0.0,
    noise: NoiseSource | None = None,
    clip_denoised: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Return x_0 [N, C, H, W], fp32, by DDIM (Song et al., 2021, eq. 12 and 16).

    `eta` = 0 is deterministic, 1 adds the posterior's variance; `noise` is needed, and used as in
    `ddpm_sample`, for `eta` > 0: ConfigError without it.
    """
    if eta > 0 and noise is None:
        raise ConfigError(
            f"evaluation.eta = {eta}: needs a source of noise; give noise, or eta = 0"
        )
    x, last = x_T.float(), diffusion.num_timesteps - 1
    for i in _steps(diffusion, progress):
        t = _timestep(x, last - i)
        x_start = _estimate(model_fn, diffusion, x, last - i, clip_denoised).pred_xstart
        # Back from x_start, which may have been clipped, not the network's own eps (as upstream).
        eps = diffusion.at("sqrt_recip_alphas_cumprod", t) * x - x_start
        eps = eps / diffusion.at("sqrt_recipm1_alphas_cumprod", t)
        alpha_bar, alpha_bar_prev = (
            diffusion.at(name, t) for name in ("alphas_cumprod", "alphas_cumprod_prev")
        )
        # Eq. 16, then eq. 12.
        sigma = ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
        sigma = eta * sigma
        x = alpha_bar_prev.sqrt() * x_start + (1 - alpha_bar_prev - sigma**2).sqrt() * eps
        if eta > 0 and noise is not None and i < last:
            x = x + sigma * noise[i]
    return x


@torch.no_grad()
def dpm_solver_sample(
    model_fn: ModelFn,
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    clip_denoised: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Return x_0 [N, C, H, W], fp32, by DPM-Solver++(2M) (Lu et al., 2022, algorithm 2).

    It solves the same equation as DDIM with eta 0, to second order at one call of the network per
    step. Deterministic; the last step returns the network's estimate of x_0.
    """
    keep, pull, extrapolate = _solver_coefficients(diffusion.alphas_cumprod)
    x, last = x_T.float(), diffusion.num_timesteps - 1
    # extrapolate[0] is 0: there is no estimate before the first.
    previous = torch.zeros_like(x)
    for i in _steps(diffusion, progress):
        x_start = _estimate(model_fn, diffusion, x, last - i, clip_denoised).pred_xstart
        data = x_start + extrapolate[i] * (x_start - previous)
        x = keep[i] * x + pull[i] * data
        previous = x_start
    return x


def _solver_coefficients(alphas_cumprod: np.ndarray) -> tuple[list[float], ...]:
    """Return keep, pull and extrapolate, each [steps], in the order of sampling.

    A step from s to t is x_t = keep x_s + pull (x_start + extrapolate (x_start - previous)), with
    lambda = log(alpha / sigma), h = lambda_t - lambda_s: keep = sigma_t / sigma_s,
    pull = alpha_t (1 - exp(-h)), extrapolate = h / (2 h_previous). The last step ends at x_0.
    """
    alpha = np.append(np.sqrt(alphas_cumprod[::-1]), 1.0)
    sigma = np.append(np.sqrt(1 - alphas_cumprod[::-1]), 0.0)
    # Without the last, x_0, whose SNR is infinite.
    log_snr = 2 * np.log(alpha[:-1] / sigma[:-1])
    h = np.diff(log_snr) / 2
    keep = sigma[1:] / sigma[:-1]
    # alpha_t (1 - exp(-h)) written so that the infinite h of the last step does not occur.
    pull = alpha[1:] - keep * alpha[:-1]
    extrapolate = np.zeros(len(keep))
    # First order at the start, where there is one estimate, and at the end: the step to timestep 0
    # is several times as long as those before it, the last one infinitely long.
    extrapolate[1:-2] = np.where(log_snr[:-3] > _DIMMEST_LOG_SNR, h[1:-1] / (2 * h[:-2]), 0.0)
    # Python's floats go into a kernel as arguments; a tensor would have to be copied first.
    return keep.tolist(), pull.tolist(), extrapolate.tolist()


def _estimate(
    model_fn: ModelFn, diffusion: GaussianDiffusion, x: Tensor, index: int, clip_denoised: bool
) -> PosteriorEstimate:
    # The network, and so its masks, is asked by the original timestep; tables go by the kept one.
    output = model_fn(x, _timestep(x, int(diffusion.timestep_map[index])))
    return diffusion.p_mean_variance(output, x, _timestep(x, index), clip_denoised)


def _steps(diffusion: GaussianDiffusion, progress: Progress | None) -> Iterable[int]:
    steps = range(diffusion.num_timesteps)
    return progress(steps) if progress else steps


def _timestep(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)
