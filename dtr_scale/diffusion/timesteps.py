"""Which timestep each sample of a run is noised to, as a function of its position."""

from dataclasses import dataclass

import numpy as np

from dtr_scale.randomness import keyed_generator


@dataclass(frozen=True, eq=False)
class TimestepSampler:
    """Stratified timesteps: the places of a global batch go round the clusters.

    `boundaries` int64 [K + 1] come from `timestep_clusters`. Every answer depends on the step and
    the place in the global batch alone, never on which rank asks.
    """

    seed: int
    boundaries: np.ndarray
    global_batch_size: int

    @property
    def num_clusters(self) -> int:
        return len(self.boundaries) - 1

    def clusters(self, step: int) -> np.ndarray:
        """Return the cluster of every place of the global batch, int64 [B]."""
        # The shift keeps a place, and the rank that owns it, from meeting one cluster for ever.
        shift = keyed_generator(self.seed, "cluster_shift", step).integers(self.num_clusters)
        return (np.arange(self.global_batch_size) + shift) % self.num_clusters

    def counts(self, step: int) -> np.ndarray:
        """Return the number of samples of each cluster in the global batch, int64 [K]."""
        return np.bincount(self.clusters(step), minlength=self.num_clusters)

    def draw(self, step: int, places: range, salt: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the timesteps t and the clusters of `places`, int64 [n] each.

        t is uniform inside its cluster; `salt` gives another draw for the same places.
        """
        cluster = self.clusters(step)[places.start : places.stop : places.step]
        positions = (step * self.global_batch_size + place for place in places)
        t = [
            keyed_generator(self.seed, "timestep", position, salt).integers(
                self.boundaries[k], self.boundaries[k + 1]
            )
            for position, k in zip(positions, cluster, strict=True)
        ]
        return np.array(t, dtype=np.int64), cluster
