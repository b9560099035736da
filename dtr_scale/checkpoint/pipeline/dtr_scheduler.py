"""Denoise by DDPM, DDIM or DPM-Solver++ with a run's own betas and learned variance, for diffusers.

Timesteps are respaced as improved-diffusion does it. Written by dtr-scale; licensed under the
Apache License 2.0.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

SAMPLERS = ("ddpm", "ddim", "dpm_solver")
_DIMMEST_LOG_SNR = -10.2  # below it DPM-Solver++ takes steps of the first order


class DTRScheduler(SchedulerMixin, ConfigMixin):
    """The steps from noise to x_0.

    With `learn_sigma` the network's output is [noise, variance]. `eta` is DDIM's noise.
    `clip_sample` cuts each predicted x_0 to [-1, 1].
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int,
        trained_betas: Sequence[float],
        learn_sigma: bool,
        sampler: str = "ddpm",
        eta: float = 0.0,
        clip_sample: bool = False,
        prediction_type: str = "epsilon",
    ) -> None:
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r} is unknown; give one of {', '.join(SAMPLERS)}")
        self.sampler, self.eta = sampler, eta
        self.init_noise_sigma = 1.0
        self._alphas_cumprod = np.cumprod(1 - np.array(trained_betas, dtype=np.float64))
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(
        self, num_inference_steps: int | str, device: str | torch.device | None = None
    ) -> None:
        """Keep so many timesteps, evenly spread; "ddim50" keeps 50 at one whole-number stride."""
        kept = _kept_timesteps(self.config["num_train_timesteps"], num_inference_steps)
        alphas_cumprod = self._alphas_cumprod[kept]
        previous = np.append(1.0, alphas_cumprod[:-1])
        betas = 1 - alphas_cumprod / previous
        variance = betas * (1 - previous) / (1 - alphas_cumprod)
        variance[0] = variance[1]  # 0 at t = 0
        self.num_inference_steps = len(kept)
        # Original timesteps, which the network and its masks go by.
        self.timesteps = torch.from_numpy(kept[::-1].copy()).to(device)
        self._places = {int(t): i for i, t in enumerate(kept)}
        self._tables = {
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": previous,
            "sqrt_recip": np.sqrt(1 / alphas_cumprod),
            "sqrt_recipm1": np.sqrt(1 / alphas_cumprod - 1),
            "coef_start": betas * np.sqrt(previous) / (1 - alphas_cumprod),
            "coef_t": (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
            "low": np.log(variance),
            "high": np.log(betas),
            "fixed": np.log(np.append(variance[1], betas[1:])),
        }
        self._solver = _solver_coefficients(alphas_cumprod)
        self._estimate: Tensor | None = None

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return `sample`: this process has a fixed variance."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Return x at the next lower kept timestep, fp32; at the last one x_0.

        `model_output` is [N, 2C or C, H, W] at the original `timestep` of all samples.
        `variance_noise` [N, C, H, W] is used where the step adds noise, else it is drawn by
        `generator`.
        """
        place, x = self._places[int(timestep)], sample.float()
        output, channels = model_output.float(), sample.shape[1]
        eps, sigma = output[:, :channels], output[:, channels:]
        x_start = self._at("sqrt_recip", place, x) * x - self._at("sqrt_recipm1", place, x) * eps
        if self.config["clip_sample"]:
            x_start = x_start.clamp(-1, 1)

        def noise() -> Tensor:
            if variance_noise is not None:
                return variance_noise.to(x)
            return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)

        if self.sampler == "ddpm":
            x = self._at("coef_start", place, x) * x_start + self._at("coef_t", place, x) * x
            if place > 0:
                x = x + torch.exp(0.5 * self._log_variance(sigma, place, x)) * noise()
        elif self.sampler == "ddim":
            x, deviation = self._ddim(x, x_start, place)
            if self.eta > 0 and place > 0:
                x = x + deviation * noise()
        else:
            x = self._dpm_solver(x, x_start, place)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _ddim(self, x: Tensor, x_start: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Return Song et al. (2021), eq. 12, without its noise, and eq. 16."""
        # Back from x_start, which may have been cut.
        eps = self._at("sqrt_recip", place, x) * x - x_start
        eps = eps / self._at("sqrt_recipm1", place, x)
        alpha_bar = self._at("alphas_cumprod", place, x)
        previous = self._at("alphas_cumprod_prev", place, x)
        deviation = ((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)).sqrt()
        deviation = self.eta * deviation
        return previous.sqrt() * x_start + (1 - previous - deviation**2).sqrt() * eps, deviation

    def _dpm_solver(self, x: Tensor, x_start: Tensor, place: int) -> Tensor:
        """Return a step of DPM-Solver++(2M) (Lu et al., 2022, algorithm 2)."""
        number = self.num_inference_steps - 1 - place
        keep, pull, extrapolate = (coefficients[number] for coefficients in self._solver)
        previous = torch.zeros_like(x) if number == 0 else self._estimate
        assert previous is not None
        data = x_start + extrapolate * (x_start - previous)
        self._estimate = x_start
        return keep * x + pull * data

    def _log_variance(self, sigma: Tensor, place: int, x: Tensor) -> Tensor:
        if not self.config["learn_sigma"]:
            return self._at("fixed", place, x)
        # Nichol & Dhariwal (2021), eq. 15.
        fraction = (sigma + 1) / 2
        return fraction * self._at("high", place, x) + (1 - fraction) * self._at("low", place, x)

    def _at(self, table: str, place: int, x: Tensor) -> Tensor:
        return torch.tensor(self._tables[table][place], dtype=torch.float32, device=x.device)


def _kept_timesteps(num_timesteps: int, steps: int | str) -> np.ndarray:
    """Return the kept timesteps, ascending, as improved-diffusion spaces them."""
    if str(steps).startswith("ddim"):
        count = int(str(steps).removeprefix("ddim"))
        for stride in range(1, num_timesteps):
            if -(-num_timesteps // stride) == count:
                return np.arange(0, num_timesteps, stride)
        raise ValueError(f"no whole-number stride keeps {count} of {num_timesteps} timesteps")
    count = int(steps)
    if not 2 <= count <= num_timesteps:
        raise ValueError(f"num_inference_steps {steps!r}: give 2 to {num_timesteps}")
    # Added up, not multiplied: ties of the rounding depend on it.
    places = np.cumsum(np.append(0.0, np.full(count - 1, (num_timesteps - 1) / (count - 1))))
    return np.round(places).astype(np.int64)


def _solver_coefficients(alphas_cumprod: np.ndarray) -> tuple[list[float], ...]:
    """Return keep, pull and extrapolate of each step, in the order of sampling."""
    alpha = np.append(np.sqrt(alphas_cumprod[::-1]), 1.0)
    sigma = np.append(np.sqrt(1 - alphas_cumprod[::-1]), 0.0)
    log_snr = 2 * np.log(alpha[:-1] / sigma[:-1])
    h = np.diff(log_snr) / 2
    keep = sigma[1:] / sigma[:-1]
    pull = alpha[1:] - keep * alpha[:-1]
    extrapolate = np.zeros(len(keep))
    extrapolate[1:-2] = np.where(log_snr[:-3] > _DIMMEST_LOG_SNR, h[1:-1] / (2 * h[:-2]), 0.0)
    return keep.tolist(), pull.tolist(), extrapolate.tolist()
