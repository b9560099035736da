"""Noise samples and denoise them (Ho et al., 2020; learned variances: Nichol & Dhariwal, 2021)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtr_scale.diffusion.schedule import beta_schedule, space_timesteps
from dtr_scale.errors import ConfigError


class PosteriorEstimate(NamedTuple):
    """The Gaussian p(x_{t-1} | x_t) and the x_start behind it, each fp32 [N, C, H, W]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


class GaussianDiffusion:
    """The forward process q, its posterior, and the loss of a network that predicts the noise.

    `noise_schedule` is one of `beta_schedule` over `num_timesteps`. The timesteps t are those that
    `timestep_respacing` keeps (see `space_timesteps`); `timestep_map[t]` is the original one, which
    the network is given. Without `learn_sigma` the network's output is eps alone. Tables are
    float64; what leaves a method is fp32. Raises ConfigError for settings that do not fit.
    """

    def __init__(
        self,
        noise_schedule: str = "cosine",
        num_timesteps: int = 1000,
        timestep_respacing: str | int | Sequence[int] | None = "",
        learn_sigma: bool = True,
    ) -> None:
        self.timestep_map = space_timesteps(num_timesteps, timestep_respacing)
        self.num_timesteps = len(self.timestep_map)
        if self.num_timesteps < 2:
            raise ConfigError(
                f"diffusion.num_timesteps = {self.num_timesteps}: too few; keep at least 2"
            )
        self.learn_sigma = learn_sigma
        alphas_cumprod = np.cumprod(1 - beta_schedule(noise_schedule, num_timesteps))
        self.alphas_cumprod = alphas_cumprod[self.timestep_map]
        # Anew, so that abar at a kept timestep is what it was (improved-diffusion's
        # SpacedDiffusion).
        self.betas = 1 - self.alphas_cumprod / np.append(1.0, self.alphas_cumprod[:-1])
        self._tables = _tables(self.betas, self.alphas_cumprod)
        self._tables_on: dict[torch.device, dict[str, Tensor]] = {}

    def at(self, table: str, t: Tensor) -> Tensor:
        """Return the entries of a table for timesteps t [N], fp32 [N, 1, 1, 1]."""
        # Copied once per device: a copy in every micro-step would make the host wait each time.
        if t.device not in self._tables_on:
            self._tables_on[t.device] = {
                name: torch.tensor(values, dtype=torch.float32, device=t.device)
                for name, values in self._tables.items()
            }
        return self._tables_on[t.device][table][t].view(-1, 1, 1, 1)

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio abar_t / (1 - abar_t), fp32 [N]."""
        return self.at("snr", t).view(-1)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = sqrt(abar_t) x_start + sqrt(1 - abar_t) noise, fp32 [N, C, H, W]."""
        # Ho et al., eq. 4, by the reparameterization of their section 3.2.
        signal = self.at("sqrt_alphas_cumprod", t) * x_start.float()
        return signal + self.at("sqrt_one_minus_alphas_cumprod", t) * noise.float()

    def training_losses(
        self,
        model_fn: Callable[[Tensor, Tensor], Tensor],
        x_start: Tensor,
        t: Tensor,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """Return the `loss_terms` of what `model_fn(x_t, t)` makes of x_start noised to t."""
        x_t = self.q_sample(x_start, t, noise)
        return self.loss_terms(model_fn(x_t, t), x_start=x_start, x_t=x_t, t=t, noise=noise)

    def loss_terms(
        self, model_output: Tensor, *, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Return "mse" [N], the error of eps, and "vb" [N], the variational bound in bits.

        The bound trains the variance alone: the mean in it is detached. Without `learn_sigma` it
        is zero. `model_output` is [N, 2C or C, H, W] of any dtype.
        """
        eps, sigma = self._split(model_output)
        mse = _mean_flat((noise.float() - eps) ** 2)
        if sigma is None:
            return {"mse": mse, "vb": torch.zeros_like(mse)}
        # Else the bound, whose scale differs between timesteps, would train the mean as well.
        frozen_mean = torch.cat([eps.detach(), sigma], dim=1)
        return {"mse": mse, "vb": self._variational_bound(frozen_mean, x_start.float(), x_t, t)}

    def p_mean_variance(
        self, model_output: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = False
    ) -> PosteriorEstimate:
        """Return the network's p(x_{t-1} | x_t), with pred_xstart cut to [-1, 1] if asked."""
        x_t = x_t.float()
        eps, sigma = self._split(model_output)
        log_variance = self._log_variance(sigma, t).expand_as(eps)
        # `q_sample` solved for x_start.
        pred_xstart = self.at("sqrt_recip_alphas_cumprod", t) * x_t
        pred_xstart = pred_xstart - self.at("sqrt_recipm1_alphas_cumprod", t) * eps
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean = self._posterior_mean(pred_xstart, x_t, t)
        return PosteriorEstimate(mean, log_variance.exp(), log_variance, pred_xstart)

    def _split(self, model_output: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.learn_sigma:
            return model_output.float(), None
        eps, sigma = model_output.float().chunk(2, dim=1)
        return eps, sigma

    def _posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_start) (Ho et al., eq. 7)."""
        coef_start, coef_t = self.at("posterior_coef_start", t), self.at("posterior_coef_t", t)
        return coef_start * x_start + coef_t * x_t

    def _log_variance(self, sigma: Tensor | None, t: Tensor) -> Tensor:
        if sigma is None:
            return self.at("fixed_log_variance", t)
        # Nichol & Dhariwal, eq. 15: between the posterior's variance and beta_t.
        # Nothing holds sigma in [-1, 1], as upstream.
        fraction = (sigma + 1) / 2
        low, high = self.at("posterior_log_variance", t), self.at("log_betas", t)
        return fraction * high + (1 - fraction) * low

    def _variational_bound(
        self, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Return KL(q(x_{t-1} | x_t, x_start) || p), or -log p(x_start | x_1) at t = 0, [N]."""
        # Without clipping, as upstream trains.
        p = self.p_mean_variance(model_output, x_t, t)
        kl = _normal_kl(
            self._posterior_mean(x_start, x_t.float(), t),
            self.at("posterior_log_variance", t),
            p.mean,
            p.log_variance,
        )
        nll = -_discretized_log_likelihood(x_start, p.mean, 0.5 * p.log_variance)
        # Both are computed for all samples and chosen on the device: to know which have t = 0 the
        # host would have to wait. Bits, not nats.
        return torch.where(t == 0, _mean_flat(nll), _mean_flat(kl)) / math.log(2)


def _tables(betas: np.ndarray, alphas_cumprod: np.ndarray) -> dict[str, np.ndarray]:
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    # Ho et al., eq. 7, as the two coefficients of the posterior's mean below.
    posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
    # The posterior's variance is 0 at t = 0: its logarithm takes the next value.
    posterior_variance[0] = posterior_variance[1]
    return {
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "snr": alphas_cumprod / (1 - alphas_cumprod),
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
        "posterior_log_variance": np.log(posterior_variance),
        "posterior_coef_start": betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod),
        "posterior_coef_t": (1 - alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
        "log_betas": np.log(betas),
        # improved-diffusion's FIXED_LARGE: beta_t, but at t = 0 the posterior's next.
        "fixed_log_variance": np.log(np.append(posterior_variance[1], betas[1:])),
    }


def _normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """Return KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) in nats, elementwise."""
    ratio = torch.exp(logvar1 - logvar2)
    return 0.5 * (logvar2 - logvar1 - 1 + ratio + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return log p of x's bin among 256 on [-1, 1], in nats, elementwise (Ho et al., eq. 13)."""
    centered, inverse_scale = x - mean, torch.exp(-log_scale)
    cdf_high = _normal_cdf((centered + 1 / 255) * inverse_scale)
    cdf_low = _normal_cdf((centered - 1 / 255) * inverse_scale)
    # The outermost bins reach to infinity.
    mass = torch.where(x > 0.999, 1 - cdf_low, cdf_high - cdf_low)
    mass = torch.where(x < -0.999, cdf_high, mass)
    # Upstream's floor: far from the mean the mass rounds to 0.
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Return the tanh approximation of the normal distribution function, as upstream uses it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean_flat(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
