"""Cut the timesteps into clusters of neighbours, the tasks of ANT (Go et al., 2023).

Boundaries are int64 [K + 1]: cluster k holds boundaries[k] <= t < boundaries[k + 1],
at least one timestep, from boundaries[0] = 0 to boundaries[K] = T. ConfigError unless 1 <= K <= T.
"""

import numpy as np

from dtr_scale.errors import ConfigError


def timestep_clusters(num_timesteps: int, num_clusters: int) -> np.ndarray:
    """Return the boundaries of intervals that are equal up to one timestep."""
    _require_timesteps(num_timesteps, num_clusters)
    return np.arange(num_clusters + 1) * num_timesteps // num_clusters


def log_snr_clusters(snr: np.ndarray, num_clusters: int) -> np.ndarray:
    """Return the boundaries by log SNR, from snr [T] > 0: |log SNR(c) - log SNR(t)| is least."""
    log_snr = np.log(np.asarray(snr, dtype=np.float64))
    return interval_clusters(np.abs(log_snr[:, None] - log_snr), num_clusters)


def affinity_clusters(affinity: np.ndarray, num_clusters: int) -> np.ndarray:
    """Return the boundaries by task affinity, from `gradient_affinity`'s [T, T]: it is greatest."""
    return interval_clusters(-np.asarray(affinity), num_clusters)


def interval_clusters(distance: np.ndarray, num_clusters: int) -> np.ndarray:
    """Return the boundaries of the K intervals whose timesteps lie nearest to their centres.

    The least sum over the intervals [l, r], r included, of distance[c, t] over t in [l, r], with
    the centre c = (l + r) // 2, for any distance float [T, T]; found by dynamic programming in
    O(K T^2). Of two middle timesteps ANT's released code takes the upper one.
    """
    num_timesteps = len(distance)
    _require_timesteps(num_timesteps, num_clusters)
    if np.shape(distance) != (num_timesteps, num_timesteps) or not np.isfinite(distance).all():
        raise ConfigError(
            f"distances of timesteps {list(np.shape(distance))} are no square of finite numbers; "
            "give float [T, T]"
        )
    cost = _interval_costs(distance)
    # least[e]: the least cost of cutting the first e timesteps into as many intervals as the loop
    # has seen.
    least, starts = cost[:, 0], []
    # total[e, s]: the last interval is [s, e), those before it cut the first s at least cost.
    for _ in range(num_clusters - 1):
        total = least + cost
        starts.append(total.argmin(axis=1))
        least = total.min(axis=1)
    # Back from the last interval, whose end is known: each start is the end of the one before.
    boundaries = [num_timesteps]
    for start in reversed(starts):
        boundaries.append(start[boundaries[-1]])
    return np.array([0, *reversed(boundaries)], dtype=np.int64)


def _interval_costs(distance: np.ndarray) -> np.ndarray:
    """Return the cost of the interval from `start` up to `end`, float64 [end T + 1, start T + 1].

    Intervals without timesteps cost infinity.
    """
    num_timesteps = len(distance)
    # Sums from 0 on give the cost of every interval in O(T^2); adding up each would take O(T^3).
    before = np.zeros((num_timesteps, num_timesteps + 1))  # [c, t]: sum of distance[c, :t]
    np.cumsum(distance, axis=1, out=before[:, 1:])
    end, start = np.ogrid[: num_timesteps + 1, : num_timesteps + 1]
    # Clipped for intervals without timesteps alone, whose cost is infinity whatever it is.
    centre = np.clip((start + end - 1) // 2, 0, num_timesteps - 1)
    return np.where(start < end, before[centre, end] - before[centre, start], np.inf)


def _require_timesteps(num_timesteps: int, num_clusters: int) -> None:
    if not 1 <= num_clusters <= num_timesteps:
        raise ConfigError(f"num_clusters = {num_clusters}: not accepted; give 1 to {num_timesteps}")
