import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.diffusion.clusters import (
    affinity_clusters,
    interval_clusters,
    log_snr_clusters,
    timestep_clusters,
)
from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.errors import ConfigError

sizes = st.integers(1, 9).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t)))


def cost(distance, boundaries):
    """The sum that interval clustering makes least, term by term."""
    return sum(
        distance[(start + end - 1) // 2, t]
        for start, end in itertools.pairwise(boundaries)
        for t in range(start, end)
    )


def is_a_partition(boundaries, num_timesteps, num_clusters):
    assert boundaries.dtype == np.int64
    assert len(boundaries) == num_clusters + 1
    assert (boundaries[0], boundaries[-1]) == (0, num_timesteps)
    return np.diff(boundaries).min() >= 1


def test_eight_clusters_of_a_thousand_timesteps():
    assert timestep_clusters(1000, 8).tolist() == [0, 125, 250, 375, 500, 625, 750, 875, 1000]


@given(st.integers(1, 400), st.data())
def test_clusters_cover_all_timesteps_and_are_equal_up_to_one(num_timesteps, data):
    num_clusters = data.draw(st.integers(1, num_timesteps))
    boundaries = timestep_clusters(num_timesteps, num_clusters)
    assert is_a_partition(boundaries, num_timesteps, num_clusters)
    widths = np.diff(boundaries)
    assert widths.max() - widths.min() <= 1


@settings(deadline=None)
@given(sizes, st.integers(0, 2**31))
def test_no_other_intervals_cost_less(size, seed):
    num_timesteps, num_clusters = size
    distance = np.random.default_rng(seed).normal(size=(num_timesteps, num_timesteps))
    found = interval_clusters(distance, num_clusters)
    assert is_a_partition(found, num_timesteps, num_clusters)
    least = min(
        cost(distance, (0, *inner, num_timesteps))
        for inner in itertools.combinations(range(1, num_timesteps), num_clusters - 1)
    )
    assert cost(distance, found) == pytest.approx(least, abs=1e-12)


@settings(deadline=None)
@given(sizes)
def test_at_even_distances_equal_intervals_are_best(size):
    """ANT's timestep clusters are those of |t - c|, and of a log SNR that falls evenly."""
    num_timesteps, num_clusters = size
    t = np.arange(num_timesteps)
    distance = np.abs(t[:, None] - t)
    equal = cost(distance, timestep_clusters(num_timesteps, num_clusters))
    assert cost(distance, interval_clusters(distance, num_clusters)) == equal
    assert cost(distance, log_snr_clusters(np.exp(-t / 3), num_clusters)) == equal


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("num_clusters", [1, 3, 8, 1000])
def test_log_snr_clusters_are_narrow_where_the_snr_falls_fast(schedule, num_clusters):
    snr = GaussianDiffusion(schedule).snr(torch.arange(1000)).numpy()
    boundaries = log_snr_clusters(snr, num_clusters)
    assert is_a_partition(boundaries, 1000, num_clusters)
    log_snr = np.log(snr.astype(np.float64))
    distance = np.abs(log_snr[:, None] - log_snr)
    assert cost(distance, boundaries) <= cost(distance, timestep_clusters(1000, num_clusters))
    if num_clusters == 8:
        widths = np.diff(boundaries)
        assert widths[0] < widths[3] / 2


def test_affinity_clusters_are_the_blocks_of_alike_timesteps():
    block = np.repeat([0, 1, 2], [2, 7, 4])
    affinity = np.where(block[:, None] == block, 0.9, -0.1)
    assert affinity_clusters(affinity, 3).tolist() == [0, 2, 9, 13]


@pytest.mark.parametrize("num_clusters", [0, 11])
def test_a_cluster_needs_a_timestep(num_clusters):
    for clusters in (
        lambda k: timestep_clusters(10, k),
        lambda k: log_snr_clusters(np.ones(10), k),
        lambda k: affinity_clusters(np.eye(10), k),
    ):
        with pytest.raises(ConfigError, match=f"num_clusters = {num_clusters}:.*1 to 10"):
            clusters(num_clusters)
