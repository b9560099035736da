"""Turn what the network makes of a micro-batch into its share of the objective."""

from typing import NamedTuple

import torch
from torch import Tensor

from dtr_scale.data.batch import MicroBatch
from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.objectives.objective import Objective


class Losses(NamedTuple):
    """The losses of a micro-batch's n samples, and the scalar to differentiate."""

    mse: Tensor  # [n]
    vb: Tensor  # [n]
    share: Tensor  # [], the micro-batch's share of the objective


class StepLoss:
    """The loss of a micro-batch, outside of the engine and in fp32.

    With its gradient it is some 190 small kernels: `compiled` about six.
    """

    def __init__(
        self, diffusion: GaussianDiffusion, objective: Objective, *, compiled: bool
    ) -> None:
        self._diffusion = diffusion
        self._objective = objective
        # One graph or an error: nothing in it may ask the device for a value. Batches are all of
        # one shape.
        self._compute = (
            torch.compile(self._losses, fullgraph=True, dynamic=False) if compiled else self._losses
        )

    def __call__(
        self, model_output: Tensor, x_t: Tensor, batch: MicroBatch, counts: Tensor
    ) -> Losses:
        """Return the losses of `model_output` [n, 2C or C, H, W] for x_t [n, C, H, W].

        `counts` [K] are the samples of each cluster in the global batch.
        """
        # Tensors, not the batch: the compiler looks at each of them at every call.
        x_start, t, noise, cluster = batch.x_start, batch.t, batch.noise, batch.cluster
        return Losses(*self._compute(model_output, x_t, x_start, t, noise, cluster, counts))

    def _losses(
        self,
        model_output: Tensor,
        x_t: Tensor,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor,
        cluster: Tensor,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses = self._diffusion.loss_terms(
            model_output, x_start=x_start, x_t=x_t, t=t, noise=noise
        )
        snr = self._diffusion.snr(t)
        share = self._objective.loss(**losses, snr=snr, cluster=cluster, counts=counts)
        return losses["mse"], losses["vb"], share
