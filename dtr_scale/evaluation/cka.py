"""Compare a network's representations between timesteps by centred kernel alignment (CKA).

It is the linear CKA of Kornblith et al. (2019), within each block, as in the DTR paper's figure 6.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.errors import EvaluationError
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.randomness import keyed_generator


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> float:
    """Return the linear CKA, in [0, 1], of features x [n, p] and y [n, q] of the same n samples.

    |Y^T X|^2 / (|X^T X| |Y^T Y|) with centred features and Frobenius norms, computed from the
    n x n Gram matrices, so that p and q may be large. It grows with p / n, whatever the features:
    of two independent normal ones [64, 20000] it is 0.997. `debiased` takes that away, by the
    unbiased estimator of Song et al. (2012) as in Nguyen et al. (2021), and lies in [-1, 1].

    Raises EvaluationError for fewer than 2 samples (debiased: 4), different n, features that are
    all alike, nan and inf.
    """
    if len(x) != len(y):
        raise EvaluationError(
            f"cannot compare features {list(x.shape)} with {list(y.shape)}; "
            "give two representations of the same samples"
        )
    return _alignment(torch.stack([_gram(x), _gram(y)]), debiased)[0, 1].item()


@torch.no_grad()
def timestep_cka(
    network: Denoiser,
    diffusion: GaussianDiffusion,
    x_start: Tensor,
    y: Tensor,
    timesteps: Iterable[int],
    *,
    seed: int,
    step: int | None = None,
    debiased: bool = True,
) -> Tensor:
    """Return fp32 [depth, S, S]: CKA of each block's outputs at each two of S timesteps.

    x_start [n, C, H, W] are the samples and y [n, ...] what the network is told of them. Sample i
    gets the same noise at every timestep, drawn from (seed, i). The blocks are the network's
    `routed_blocks`, of multi-experts those that ran; `step` is the training step, for masks that
    change with it. Timesteps are those of `diffusion`.

    A sample's representation is a block's whole output, all tokens side by side: a mean over the
    tokens would leave out what is where. (The paper does not say.) The n samples go through in one
    forward per timestep. Beside it there are two fp64 copies of one block's output, 16 n L D bytes
    (302 MB for 64 samples of DiT-XL/2), and the Gram matrices, 8 depth S n^2. Raises
    EvaluationError as `linear_cka` does.
    """
    noise = _noise(seed, x_start)
    grams = []
    for timestep in timesteps:
        t = torch.full((len(x_start),), timestep, device=x_start.device)
        x_t = diffusion.q_sample(x_start, t, noise)
        # q_sample goes by the kept timestep, the network and its masks by the original one.
        original = torch.full_like(t, int(diffusion.timestep_map[timestep]))
        grams.append(_block_grams(network, x_t, original, y, step))
    by_block = torch.stack(grams, dim=1)
    return torch.stack([_alignment(of_all, debiased) for of_all in by_block]).float()


def _block_grams(network: Denoiser, x: Tensor, t: Tensor, y: Tensor, step: int | None) -> Tensor:
    """Return the Gram matrices, fp64 [depth, n, n], of what each block makes of n samples."""
    grams: list[Tensor] = []

    def keep_gram(_block: nn.Module, _inputs: Any, output: Tensor) -> None:  # noqa: ANN401
        grams.append(_gram(output.flatten(1)))

    # Each output becomes its Gram matrix at once: those of 64 samples of DiT-XL/2 would take 4 GB.
    hooks = [block.register_forward_hook(keep_gram) for block in network.routed_blocks()]
    try:
        network(x, t, y, step)
    finally:
        for hook in hooks:
            hook.remove()
    # Not kept one by one: small tensors between a forward's large ones fragment the heap.
    return torch.stack(grams)


def _noise(seed: int, x_start: Tensor) -> Tensor:
    draws = [
        keyed_generator(seed, "cka.noise", index).standard_normal(
            tuple(x_start.shape[1:]), dtype=np.float32
        )
        for index in range(len(x_start))
    ]
    return torch.from_numpy(np.stack(draws)).to(x_start.device)


def _gram(features: Tensor) -> Tensor:
    """Return the inner products of features [n, p] after centring, fp64 [n, n], on the CPU."""
    features = features.double()
    centred = features - features[0]  # which makes features that are all alike exactly zero
    centred -= centred.mean(dim=0)
    return (centred @ centred.T).cpu()


def _alignment(grams: Tensor, debiased: bool) -> Tensor:
    """Return the cosines [S, S] of centred Gram matrices [S, n, n] (Kornblith et al., 2019)."""
    least = 4 if debiased else 2
    flat = (_without_diagonal(grams) if debiased else grams).flatten(1)
    norms = flat.norm(dim=1, keepdim=True)
    if grams.shape[-1] < least:
        raise EvaluationError(
            f"num_samples = {grams.shape[-1]}: too few for CKA; give at least {least} samples"
        )
    if not norms.isfinite().all():
        raise EvaluationError(
            "representations are not all finite; give a network that has not diverged"
        )
    if not (norms > 0).all():
        raise EvaluationError(
            "representations must differ between samples, and these are all alike; give other "
            "samples, or a network that has been trained further"
        )
    unit = flat / norms
    return (unit @ unit.T).clamp(-1.0, 1.0)


def _without_diagonal(grams: Tensor) -> Tensor:
    """Return [S, n, n] centred anew without their diagonals, where the bias is.

    The inner product of two is n (n - 3) times the unbiased estimate of HSIC: U-centring (Székely
    & Rizzo, 2014).
    """
    n = grams.shape[-1]
    off_diagonal = 1 - torch.eye(n, dtype=grams.dtype)
    grams = grams * off_diagonal
    rows = grams.sum(dim=2, keepdim=True) / (n - 2)
    total = rows.sum(dim=1, keepdim=True) / (n - 1)
    return (grams - rows - rows.mT + total) * off_diagonal
