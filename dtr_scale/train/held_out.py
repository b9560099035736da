"""Measure the loss of held-out samples at noise and timesteps that are always the same."""

from functools import partial

import numpy as np
import torch

from dtr_scale.data.batch import BatchAssembler
from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.diffusion.timesteps import TimestepSampler
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.train.rounds import Rounds

TIMESTEPS_PER_CLUSTER = 8
LOSS = "eval_loss"
STREAMS = "held_out."
"""Prefix of the streams of its draws: not those of the training samples at the same positions."""


class FixedTimesteps:
    """Draws go round the middles of eight equal parts of each cluster of `timesteps`."""

    def __init__(self, timesteps: TimestepSampler) -> None:
        self._timesteps = timesteps
        self.num_places = TIMESTEPS_PER_CLUSTER * timesteps.num_clusters

    def draw(
        self, samples_seen: int, places: np.ndarray | range, salt: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return t and cluster of `places`, int64 [n] each, as `TimestepSampler.draw` does."""
        positions = (samples_seen + np.asarray(places, np.int64)) % self.num_places
        part, cluster = np.divmod(positions, self._timesteps.num_clusters)
        return self._timesteps.at(cluster, (part + 0.5) / TIMESTEPS_PER_CLUSTER), cluster


class HeldOutLoss:
    """The unweighted loss of `num_draws` held-out draws, of all and of each cluster.

    Sample, timestep and noise of draw i are functions of (seed, i). Batches have one size, of at
    least `batch_size`, and fixed members, so the numbers are the same at any world size and
    micro-batch. `assembler` makes what the draws hold, its timesteps are `FixedTimesteps`.
    """

    def __init__(
        self,
        *,
        assembler: BatchAssembler,
        timesteps: FixedTimesteps,
        num_draws: int,
        batch_size: int,
        diffusion: GaussianDiffusion,
        split: str,
    ) -> None:
        self._assembler = assembler
        # Whole rounds: every timestep, and so every cluster, counts alike. In each batch, too: of
        # several experts, ranks that share their weights must call the same ones.
        self.num_draws = _round_up(num_draws, timesteps.num_places)
        self._batch_size = _round_up(batch_size, timesteps.num_places)
        self._diffusion = diffusion
        self._split = split

    def manifest(self) -> dict[str, object]:
        """Return what the numbers depend on, besides the network."""
        return {
            "split": self._split,
            "manifest_hash": self._assembler.samples.manifest.hash(self._split),
            "num_draws": self.num_draws,
            "timesteps_per_cluster": TIMESTEPS_PER_CLUSTER,
        }

    def measure(self, network: Denoiser, rounds: Rounds, step: int) -> dict[str, float]:
        """Return `eval_loss` and `eval_loss_cluster_<k>` on rank 0, {} on the others.

        All ranks call it. `step` is the training step, for masks that change with it.
        """
        world, size = rounds.world, self._batch_size
        num_batches = -(-self.num_draws // size)
        found: list[np.ndarray] = []  # [B, 2] each: loss and cluster
        try:
            for first in range(0, num_batches, world.world_size):
                # Past the last one a rank does it again, and nobody counts that.
                number = min(first + world.rank, num_batches - 1)
                found += rounds.gathered(self._losses(network, number, rounds, step))
        finally:
            # Until the next evaluation, hours away: shards that stay open keep memory and disk.
            self._assembler.samples.close()
        if not found:
            return {}
        losses, cluster = np.concatenate(found)[: self.num_draws].T
        means = {k: float(losses[cluster == k].mean()) for k in np.unique(cluster).astype(int)}
        return {
            LOSS: float(losses.mean()),
            **{f"{LOSS}_cluster_{k}": mean for k, mean in means.items()},
        }

    def _losses(self, network: Denoiser, number: int, rounds: Rounds, step: int) -> np.ndarray:
        """Return losses and clusters of the draws of a batch, float64 [B, 2]."""
        start = number * self._batch_size
        with rounds.joint():
            # Apart from the forward: storage may fail on one rank, which the others would wait
            # for in the gather of a weight.
            batch = self._assembler.assemble(0, np.arange(start, start + self._batch_size), 0)
        losses = np.empty(0)
        with rounds.joint():
            on_device = batch.to(rounds.world.device)
            model_fn = partial(network, y=on_device.y, step=step)
            # Eager: compiled blocks would be compiled again for this size.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                terms = self._diffusion.training_losses(
                    model_fn, on_device.x_start, on_device.t, on_device.noise
                )
            losses = (terms["mse"] + terms["vb"]).double().cpu().numpy()
        return np.stack([losses, batch.cluster.numpy()], axis=1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
