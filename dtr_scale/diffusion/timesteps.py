"""Draw the timestep of each sample of a run, as a function of its position."""

from dataclasses import dataclass

import numpy as np

from dtr_scale.randomness import KeyedStream, keyed_generator


def timestep_strata(timesteps: range, num_strata: int) -> np.ndarray:
    """Return boundaries float64 [K + 1] that cut a range of timesteps into equal strata.

    They are real numbers, so that K strata with as many samples each make every timestep equally
    likely whatever K: a timestep that a boundary runs through belongs to both sides by its share.
    """
    return timesteps.start + np.arange(num_strata + 1) * len(timesteps) / num_strata


@dataclass(frozen=True, eq=False)
class TimestepSampler:
    """Stratified timesteps: the places of a global batch go round the clusters.

    `boundaries` [K + 1] are ascending: the integers of `dtr_scale.diffusion.clusters` where the
    objective weights clusters, since each then needs samples of its own; else `timestep_strata`,
    and "cluster k" is stratum k. Every answer depends on the position of the global batch (the
    samples seen before it) and the place in it alone, never on which rank asks.
    """

    seed: int
    boundaries: np.ndarray
    global_batch_size: int

    @property
    def num_clusters(self) -> int:
        return len(self.boundaries) - 1

    def clusters(self, samples_seen: int) -> np.ndarray:
        """Return the cluster of every place of the global batch, int64 [B]."""
        return self._shifted(self.shift(samples_seen))

    def shift(self, samples_seen: int) -> int:
        """Return the cluster of the first place of the global batch."""
        # It keeps a place, and the rank that owns it, from meeting one cluster for ever. Its key is
        # the step of a run that always had this batch size: each batch has its own.
        nth = samples_seen // self.global_batch_size
        return int(keyed_generator(self.seed, "cluster_shift", nth).integers(self.num_clusters))

    def counts_by_shift(self) -> np.ndarray:
        """Return the samples of each cluster in a global batch of each shift, int64 [K, K]."""
        # Of the whole batch, on every rank from the position alone: no collective is needed for
        # n_k.
        shifts = range(self.num_clusters)
        return np.stack([np.bincount(self._shifted(s), minlength=len(shifts)) for s in shifts])

    def _shifted(self, shift: int) -> np.ndarray:
        return (np.arange(self.global_batch_size) + shift) % self.num_clusters

    def at(self, cluster: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return the timesteps at the fractions u [n] in [0, 1) of clusters [n], int64 [n]."""
        low, high = self.boundaries[cluster], self.boundaries[cluster + 1]
        # The product may round up to `high` itself, the next cluster's.
        last = np.ceil(high) - 1
        return np.minimum(np.floor(low + u * (high - low)), last).astype(np.int64)

    def draw(
        self, samples_seen: int, places: np.ndarray | range, salt: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the timesteps t and the clusters of `places` int [n], int64 [n] each.

        t is uniform inside its cluster; `salt` gives another draw for the same places.
        """
        places = np.asarray(places, np.int64)
        cluster = self.clusters(samples_seen)[places]
        # By the sample's own position: neither ranks nor micro-batches enter.
        u = KeyedStream(self.seed, "timestep").uniform(samples_seen + places, salt)
        return self.at(cluster, u), cluster
