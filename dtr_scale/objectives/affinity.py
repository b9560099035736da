"""Measure how alike the network's gradients at two timesteps are (ANT, Go et al., 2023)."""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.errors import EvaluationError
from dtr_scale.randomness import keyed_generator


def gradient_affinity(
    network: nn.Module,
    diffusion: GaussianDiffusion,
    batches: Iterable[tuple[Tensor, Tensor]],
    timesteps: Sequence[int],
    *,
    seed: int = 0,
    step: int | None = None,
) -> np.ndarray:
    """Return the cosine between the gradients of every two of the T timesteps, float64 [T, T].

    `batches` yields x_start [N, C, H, W] and y [N, ...], labels or texts, on the network's device.
    The gradient of a timestep is that of mse + vb summed over all samples of all batches, as in
    ANT's code; ANT also averages the matrices of several checkpoints, which is left to the caller.
    The noise is a function of (seed, sample, timestep). `step` is the training step, for masks that
    change with it.

    The S `timesteps` are measured, which holds S x P x 4 bytes of gradients on the CPU for P
    parameters. Between two of them the gradient's direction is interpolated linearly in t, beyond
    the outermost it is constant. EvaluationError if a gradient is zero or not finite.
    """
    measured = np.unique(timesteps)
    gradients = _gradients(network, diffusion, batches, measured, seed, step)
    norms = gradients.norm(dim=1)
    for t, norm in zip(measured.tolist(), norms.tolist(), strict=True):
        if not 0 < norm < float("inf"):
            raise EvaluationError(
                f"the gradient at timestep {t} has norm {norm}, so it has no direction; "
                "give batches, and a checkpoint that is trained and has not diverged"
            )
    # In place: S x P x 4 bytes a second time would double the memory.
    directions = gradients.div_(norms[:, None])
    cosine = (directions @ directions.T).double().numpy()
    return _interpolated(cosine, measured, diffusion.num_timesteps)


def _gradients(
    network: nn.Module,
    diffusion: GaussianDiffusion,
    batches: Iterable[tuple[Tensor, Tensor]],
    timesteps: np.ndarray,
    seed: int,
    step: int | None,
) -> Tensor:
    """Return the summed gradient of every timestep, fp32 [S, P] on the CPU."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = torch.zeros(len(timesteps), sum(p.numel() for p in parameters))
    position = 0
    for x_start, y in batches:
        samples = range(position, position + len(x_start))
        position = samples.stop
        for row, time in zip(gradients, timesteps.tolist(), strict=True):
            t = torch.full((len(x_start),), time, device=x_start.device)
            noise = _noise(samples, time, x_start, seed)
            losses = diffusion.training_losses(partial(network, y=y, step=step), x_start, t, noise)
            loss = (losses["mse"] + losses["vb"]).sum()
            # Zeros for parameters that a batch does not reach, so that every row has the same P
            # columns.
            parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            row.add_(torch.cat([part.flatten() for part in parts]).cpu())
    return gradients


def _noise(samples: range, t: int, like: Tensor, seed: int) -> Tensor:
    """Return the noise of `samples` at timestep t, fp32 like a batch of them."""
    draws = [
        keyed_generator(seed, "affinity_noise", position=sample, salt=t).standard_normal(
            like.shape[1:], dtype=np.float32
        )
        for sample in samples
    ]
    return torch.from_numpy(np.stack(draws)).to(like.device)


def _interpolated(cosine: np.ndarray, measured: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Return the cosines [T, T] of directions that are linear in t between the measured ones."""
    t = np.arange(num_timesteps)
    weights = np.stack([np.interp(t, measured, row) for row in np.eye(len(measured))])  # [S, T]
    # Inner products of the interpolated directions, from those of the measured: T x P numbers are
    # never held.
    products = weights.T @ cosine @ weights
    # Between two unit vectors an interpolated one is shorter than 1.
    norms = np.sqrt(np.diag(products))
    return products / np.outer(norms, norms)
