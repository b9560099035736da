"""Clusters of neighbouring timesteps, the tasks of ANT (Go et al., 2023)."""

import numpy as np

from dtr_scale.errors import ConfigError


def timestep_clusters(num_timesteps: int, num_clusters: int) -> np.ndarray:
    """Return boundaries int64 [K + 1]: cluster k holds boundaries[k] <= t < boundaries[k + 1].

    The intervals are equal up to one timestep and cover 0 to num_timesteps - 1.
    """
    if not 1 <= num_clusters <= num_timesteps:
        raise ConfigError(
            f"num_clusters: {num_clusters} is not accepted; give 1 to {num_timesteps}"
        )
    return np.arange(num_clusters + 1) * num_timesteps // num_clusters
