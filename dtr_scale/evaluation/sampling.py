"""Draw samples of a trained network: sample i is a function of (seed, i), whoever draws it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dtr_scale.diffusion.guidance import cfg_model
from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.diffusion.samplers import (
    ModelFn,
    Progress,
    ddim_sample,
    ddpm_sample,
    dpm_solver_sample,
)
from dtr_scale.errors import ConfigError
from dtr_scale.evaluation.pictures import to_uint8
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.randomness import keyed_generator

_GRID_PIXELS = 48  # small pictures are enlarged to about this


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of a sampler, part of the manifest of every published number.

    `sampler` is "ddpm", "ddim" (the one that `eta` is for) or "dpm_solver"; `cfg_channels` and
    `cfg_interval` are those of `cfg_model`.
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

    def manifest(self) -> dict[str, Any]:
        return asdict(self)


class KeyedNoise:
    """The noise of given samples: `start` is x_T, `[i]` that of the i-th sampling step."""

    def __init__(
        self, seed: int, indices: range, shape: tuple[int, ...], device: torch.device
    ) -> None:
        self._seed = seed
        self._indices = indices
        self._shape = shape
        self._device = device

    @property
    def start(self) -> Tensor:
        return self._draw("sampling.start", 0)

    def __getitem__(self, step: int) -> Tensor:
        return self._draw("sampling.step", step)

    def _draw(self, stream: str, salt: int) -> Tensor:
        # By numpy on the CPU, one generator per sample: the same on every device and in any batch.
        draws = [
            keyed_generator(self._seed, stream, index, salt).standard_normal(
                self._shape, dtype=np.float32
            )
            for index in self._indices
        ]
        return torch.from_numpy(np.stack(draws)).to(self._device)


def class_labels(indices: range, num_classes: int) -> Tensor:
    """Return the class asked for of each sample, int64 [n]: they go round, all equally frequent."""
    return torch.tensor([index % num_classes for index in indices])


@torch.no_grad()
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
    """Return samples `indices` as fp32 [n, C, H, W] on the CPU, the same for any batch_size.

    `conditions` returns labels int [n] or text tokens [n, L, D] of given samples; without it the
    classes go round. `null_condition` is that of `cfg_model`. `step` is the training step, for
    masks that change with it. Raises ConfigError for guidance that the network or its channels do
    not allow.
    """
    diffusion = GaussianDiffusion(
        settings.noise_schedule,
        settings.num_timesteps,
        timestep_respacing=str(settings.num_sampling_steps),
        learn_sigma=network.learn_sigma,
    )
    guided = cfg_model(
        network,
        settings.cfg_scale,
        settings.cfg_channels,
        settings.cfg_interval,
        null_condition,
    )
    shape = (network.in_channels, network.input_size, network.input_size)
    device = next(network.parameters()).device
    # A start for `cat`: a trial of the settings asks for no samples at all.
    batches: list[Tensor] = [torch.empty(0, *shape)]
    for first in range(0, len(indices), batch_size):
        batch = indices[first : first + batch_size]
        asked = conditions(batch) if conditions else class_labels(batch, network.num_classes)
        noise = KeyedNoise(settings.seed, batch, shape, device)

        asked = asked.to(device)

        def model_fn(x: Tensor, t: Tensor, y: Tensor = asked) -> Tensor:
            return guided(x, t, y, step)

        # To the CPU batch by batch: the device holds one batch, whatever the number of samples.
        batches.append(_sample(model_fn, diffusion, settings, noise, progress).cpu())
    return torch.cat(batches)


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


def grid_columns(num_classes: int) -> int:
    """Return the columns of a picture of samples: one per class where they are few."""
    return num_classes if 1 < num_classes <= 16 else 8


def save_grid(file: Path | BinaryIO, images: Tensor, *, columns: int) -> None:
    """Write images [n, C, H, W] in [-1, 1], one or three channels, as one PNG, row by row."""
    from PIL import Image

    n, channels, height, width = images.shape
    rows = -(-n // columns)
    levels = to_uint8(images)
    sheet = torch.zeros(channels, rows * (height + 1) + 1, columns * (width + 1) + 1)
    for i, image in enumerate(levels):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        sheet[:, top : top + height, left : left + width] = image
    pixels = sheet.to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    enlarged = max(1, _GRID_PIXELS // height)
    picture = Image.fromarray(pixels)
    size = (picture.width * enlarged, picture.height * enlarged)
    if isinstance(file, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
    picture.resize(size, Image.Resampling.NEAREST).save(file, format="PNG")
