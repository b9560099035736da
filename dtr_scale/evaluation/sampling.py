"""Draw samples of a trained network: sample i is a function of (seed, i), whoever draws it."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtr_scale.diffusion.guidance import ConditionalFn, cfg_model
from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.diffusion.samplers import (
    ModelFn,
    Progress,
    ddim_sample,
    ddpm_sample,
    dpm_solver_sample,
)
from dtr_scale.errors import ConfigError
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.randomness import KeyedStream


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of a sampler, part of the manifest of every published number.

    `sampler` is "ddpm", "ddim" (the one that `eta` is for) or "dpm_solver"; `cfg_channels` and
    `cfg_interval` are those of `cfg_model`; `labels` are those of `sample_labels`.
    """

    noise_schedule: str
    num_timesteps: int
    sampler: str
    num_sampling_steps: int | str
    cfg_scale: float
    cfg_channels: int | None
    clip_denoised: bool
    seed: int
    eta: float = 0.0
    cfg_interval: tuple[int, int] | None = None
    labels: str = "balanced"

    def manifest(self) -> dict[str, Any]:
        return asdict(self)


class KeyedNoise:
    """The noise of given samples: `start` is x_T, `[i]` that of the i-th sampling step."""

    def __init__(
        self, seed: int, indices: range, shape: tuple[int, ...], device: torch.device
    ) -> None:
        self._streams = {
            name: KeyedStream(seed, name) for name in ("sampling.start", "sampling.step")
        }
        self._indices = indices
        self._shape = shape
        self._device = device

    @property
    def start(self) -> Tensor:
        return self._draw("sampling.start", 0)

    def __getitem__(self, step: int) -> Tensor:
        return self._draw("sampling.step", step)

    def _draw(self, name: str, salt: int) -> Tensor:
        # By numpy on the CPU, one generator per sample: the same on every device and in any batch.
        # Pinned memory is copied while the GPU computes, so that the next draw does not wait.
        is_cuda = self._device.type == "cuda"
        noise = torch.empty(len(self._indices), *self._shape, pin_memory=is_cuda)
        for index, draw in zip(self._indices, noise.numpy(), strict=True):
            self._streams[name].at(index, salt).standard_normal(out=draw, dtype=np.float32)
        return noise.to(self._device, non_blocking=True)


def class_labels(indices: range, num_classes: int) -> Tensor:
    """Return the class asked for of each sample, int64 [n]: they go round, all equally frequent."""
    return torch.tensor([index % num_classes for index in indices])


def sample_labels(settings: SamplingSettings, indices: range, num_classes: int) -> Tensor:
    """Return the class asked for of each sample, int64 [n].

    Balanced labels go round (`class_labels`); random ones are drawn by (seed, index).
    """
    if settings.labels == "balanced":
        return class_labels(indices, num_classes)
    drawn = KeyedStream(settings.seed, "sampling.label").uniform(np.array(indices))
    return torch.from_numpy((drawn * num_classes).astype(np.int64))


class Sampler:
    """Draws samples of a network by batches that the caller chooses.

    `conditions` returns labels int [n] or text tokens [n, L, D] of given samples; without it they
    are `sample_labels`. `null_condition` is that of `cfg_model`. `step` is the training step, for
    masks that change with it. Raises ConfigError for guidance that the network or its channels do
    not allow.
    """

    def __init__(
        self,
        network: Denoiser,
        settings: SamplingSettings,
        *,
        conditions: Callable[[range], Tensor] | None = None,
        null_condition: Tensor | None = None,
        step: int | None = None,
    ) -> None:
        self._diffusion = GaussianDiffusion(
            settings.noise_schedule,
            settings.num_timesteps,
            timestep_respacing=str(settings.num_sampling_steps),
            learn_sigma=network.learn_sigma,
        )
        self._settings = settings
        self._network = network
        self._plain = _AtOneTimestep(network)
        self._guided = cfg_model(
            self._plain,
            settings.cfg_scale,
            settings.cfg_channels,
            settings.cfg_interval,
            null_condition,
        )
        self._null_condition = null_condition
        self._conditions = conditions or (
            lambda indices: sample_labels(settings, indices, network.num_classes)
        )
        self._step = step

    @property
    def num_steps(self) -> int:
        """How many sampling steps a batch takes."""
        return self._diffusion.num_timesteps

    def guided(self, cfg_scale: float) -> "Sampler":
        """Return what draws the same samples with another scale of guidance."""
        return Sampler(
            self._network,
            replace(self._settings, cfg_scale=cfg_scale),
            conditions=self._conditions,
            null_condition=self._null_condition,
            step=self._step,
        )

    @torch.no_grad()
    def draw(self, indices: range, progress: Progress | None = None) -> Tensor:
        """Return samples `indices` as fp32 [n, C, H, W] on the CPU."""
        network = self._network
        shape = (network.in_channels, network.input_size, network.input_size)
        device = next(network.parameters()).device
        noise = KeyedNoise(self._settings.seed, indices, shape, device)
        y = self._conditions(indices).to(device)
        model_fns = self._model_fns()

        def model_fn(x: Tensor, t: Tensor) -> Tensor:
            return next(model_fns)(x, t, y, self._step)

        # To the CPU batch by batch: the device holds one batch, whatever the number of samples.
        return _sample(model_fn, self._diffusion, self._settings, noise, progress).cpu()

    def _model_fns(self) -> Iterator[ConditionalFn]:
        """Yield what each sampling step asks: outside the interval of guidance half the work."""
        # By the timesteps on the host: to ask the device for its own, the host would wait for it.
        first, stop = self._settings.cfg_interval or (0, float("inf"))
        for t in reversed(self._diffusion.timestep_map):
            yield self._guided if first <= t < stop else self._plain


class _AtOneTimestep:
    """A network that is told the timestep of a batch once: all samples share one mask."""

    def __init__(self, network: Denoiser) -> None:
        self._network = network
        self.in_channels = network.in_channels
        self.class_dropout_prob = network.class_dropout_prob
        self.null_like = network.null_like

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, step: int | None = None) -> Tensor:
        return self._network(x, t[:1], y, step)


def draw_samples(
    network: Denoiser,
    settings: SamplingSettings,
    indices: range,
    *,
    batch_size: int,
    conditions: Callable[[range], Tensor] | None = None,
    null_condition: Tensor | None = None,
    step: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return samples `indices` as fp32 [n, C, H, W] on the CPU, drawn in batches by a `Sampler`."""
    sampler = Sampler(
        network, settings, conditions=conditions, null_condition=null_condition, step=step
    )
    # A start for `cat`: a trial of the settings asks for no samples at all.
    nothing = torch.empty(0, network.in_channels, network.input_size, network.input_size)
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return torch.cat([nothing, *(sampler.draw(batch, progress) for batch in batches)])


def _sample(
    model_fn: ModelFn,
    diffusion: GaussianDiffusion,
    settings: SamplingSettings,
    noise: KeyedNoise,
    progress: Progress | None,
) -> Tensor:
    start, clip = noise.start, settings.clip_denoised
    match settings.sampler:
        case "ddpm":
            return ddpm_sample(model_fn, diffusion, start, noise, clip, progress)
        case "ddim":
            return ddim_sample(model_fn, diffusion, start, settings.eta, noise, clip, progress)
        case "dpm_solver":
            return dpm_solver_sample(model_fn, diffusion, start, clip, progress)
        case other:
            raise ConfigError(
                f"evaluation.sampler: {other!r} is unknown; accepted: ddpm, ddim, dpm_solver"
            )
