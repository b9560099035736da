"""Make AdamW's update and move the averages in one pass over a rank's flat buffers.

PyTorch's kernels make three passes of it, of 46 bytes an element, and one of 8 more where gradients
are clipped. The compiler makes one kernel of what stands here, of 38 bytes an element with one
average: it reads gradient, master, both moments and the average once, and writes all but the
gradient and the cast weight. Each further average costs 8.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dtr_scale.engines.base import ADAM_MOMENTS, Averaging
from dtr_scale.engines.flat_group import ALIGNMENT
from dtr_scale.engines.flat_shard import FlatShard

_ONE_PASS: dict[str, Any] = {"realize_reads_threshold": 64, "realize_acc_reads_threshold": 64}
"""Reads that the compiler takes into one loop. By its own limits of 4 and 8 it would write the new
masters to a buffer, and make a second loop of what reads them."""


class FusedUpdate:
    """The update of a shard, compiled; equal to AdamW's and `Engine.average`'s but for rounding."""

    def __init__(self, shard: FlatShard, max_norm: float | None, *, compiled: bool = True) -> None:
        self._max_norm = max_norm
        # Groups differ in their decay alone, and states are parts of the buffers but for the count.
        self._group = shard.adam.param_groups[0]
        self._step = next(iter(shard.adam.state.values()))["step"]
        # Elements that decay alike come in whole rows.
        self._decays = shard.decays()
        buffers = (shard.gradient, shard.master, *(shard.moments[m] for m in ADAM_MOMENTS))
        self._buffers = [buffer.view(-1, ALIGNMENT) for buffer in (*buffers, shard.cast)]
        self._factors, self._update = _factors, _update
        if compiled:
            self._factors = torch.compile(_factors, fullgraph=True)
            self._update = torch.compile(_update, fullgraph=True, options=_ONE_PASS)
        self._never = torch.zeros((), device=shard.master.device)

    @torch.no_grad()
    def __call__(self, norm: Tensor, skip: Tensor | None, averaging: Sequence[Averaging]) -> None:
        """Update the shard, given the gradient's norm [] and 1 [] where it is to stay as it is."""
        group = self._group
        # Numbers of the host that change are tensors of the CPU: a kernel takes them as they are,
        # and no step has a graph of its own.
        lr, *weights = (
            torch.tensor(number, dtype=torch.float64)
            for number in (group["lr"], *(each.weight for each in averaging))
        )
        factors = self._factors(
            norm,
            self._never if skip is None else skip,
            self._step,
            lr,
            weights,
            betas=group["betas"],
            max_norm=self._max_norm,
        )
        self._update(
            self._buffers,
            [each.average.values[0].view(-1, ALIGNMENT) for each in averaging],
            self._decays,
            factors,
            betas=group["betas"],
            eps=group["eps"],
        )


def _factors(
    norm: Tensor,
    skip: Tensor,
    step: Tensor,
    lr: Tensor,
    weights: list[Tensor],
    *,
    betas: tuple[float, float],
    max_norm: float | None,
) -> Tensor:
    """Count the update, and return what is the same for all elements, fp32 [5 + averages].

    Those are skip, the gradient's factor, the rate, the rate over the first bias correction, the
    root of the second, and the averages' weights.
    """
    # A kernel of its own: within the other, each element would take the powers.
    step.add_(1 - skip)
    count = step.double()
    # As `clip_grads_with_norm_` has it. A factor of nan would stay in the padding for ever.
    clip = torch.ones_like(count)
    if max_norm is not None:
        clip = (max_norm / (norm.nan_to_num(nan=0.0) + 1e-6)).clamp(max=1.0)
    rate = lr / (1 - betas[0] ** count)
    root = (1 - betas[1] ** count).sqrt()
    zero = torch.zeros_like(count)
    # In one tensor, or each would be a kernel.
    return torch.stack([zero + each for each in (skip, clip, lr, rate, root, *weights)]).float()


def _update(
    buffers: list[Tensor],
    averages: list[Tensor],
    decays: Tensor | None,
    factors: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update the buffers in place, [rows, 64] each, as `torch.optim.AdamW` does; decays [rows, 1].

    They are gradient, master, both moments and cast weight.
    """
    gradient, master, exp_avg, exp_avg_sq, cast = buffers
    skip, clip, lr, rate, root, *weights = factors.unbind()
    is_made = skip == 0
    g = gradient.float() * clip
    m = exp_avg + (1 - betas[0]) * (g - exp_avg)
    v = betas[1] * exp_avg_sq + (1 - betas[1]) * g * g
    decayed = master if decays is None else master - lr * decays * master
    updated = decayed - rate * m / (v.sqrt() / root + eps)
    for average, weight in zip(averages, weights, strict=True):
        average.copy_(torch.where(is_made, average + weight * (updated - average), average))
    updated = torch.where(is_made, updated, master)
    cast.copy_(updated)
    master.copy_(updated)
    exp_avg.copy_(torch.where(is_made, m, exp_avg))
    exp_avg_sq.copy_(torch.where(is_made, v, exp_avg_sq))
