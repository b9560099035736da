"""Draw x_0 from noise: DDPM (ancestral) and DDIM."""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from dtr_scale.diffusion.process import GaussianDiffusion

ModelFn = Callable[[Tensor, Tensor], Tensor]
"""(x [N, C, H, W], original timestep int [N]) -> [N, 2C or C, H, W]."""


class NoiseSource(Protocol):
    """Noise by sampling step: source[i] is [N, C, H, W] for the i-th step taken."""

    def __getitem__(self, index: int, /) -> Tensor: ...


Progress = Callable[[Iterable[int]], Iterable[int]]


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
        t = _timestep(x, last - i)
        output = model_fn(x, _timestep(x, int(diffusion.timestep_map[last - i])))
        p = diffusion.p_mean_variance(output, x, t, clip_denoised)
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

    `eta` = 0 is deterministic; `noise` is needed, and used as in `ddpm_sample`, for `eta` > 0.
    """
    if eta > 0 and noise is None:
        raise ValueError("ddim_sample with eta > 0 needs noise")
    x, last = x_T.float(), diffusion.num_timesteps - 1
    for i in _steps(diffusion, progress):
        t = _timestep(x, last - i)
        output = model_fn(x, _timestep(x, int(diffusion.timestep_map[last - i])))
        x_start = diffusion.p_mean_variance(output, x, t, clip_denoised).pred_xstart
        eps = diffusion.at("sqrt_recip_alphas_cumprod", t) * x - x_start
        eps = eps / diffusion.at("sqrt_recipm1_alphas_cumprod", t)
        alpha_bar, alpha_bar_prev = (
            diffusion.at(name, t) for name in ("alphas_cumprod", "alphas_cumprod_prev")
        )
        sigma = ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
        sigma = eta * sigma
        x = alpha_bar_prev.sqrt() * x_start + (1 - alpha_bar_prev - sigma**2).sqrt() * eps
        if noise is not None and i < last:
            x = x + sigma * noise[i]
    return x


def _steps(diffusion: GaussianDiffusion, progress: Progress | None) -> Iterable[int]:
    steps = range(diffusion.num_timesteps)
    return progress(steps) if progress else steps


def _timestep(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)
