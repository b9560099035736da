import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.diffusion.clusters import timestep_clusters
from dtr_scale.diffusion.timesteps import TimestepSampler, timestep_strata

ALMOST_ONE = np.nextafter(1.0, 0.0)
batches = {
    "seed": st.integers(0, 2**31),
    "position": st.integers(0, 2_000_000 * 256),
    "batch": st.integers(1, 40),
    "num_clusters": st.integers(1, 12),
}


def sampler(seed=0, num_timesteps=1000, num_clusters=8, batch=16):
    return TimestepSampler(seed, timestep_clusters(num_timesteps, num_clusters), batch)


@settings(deadline=None, max_examples=30)
@given(**batches, data=st.data())
def test_a_draw_does_not_depend_on_who_draws(seed, position, batch, num_clusters, data):
    cut = data.draw(st.integers(0, batch))
    whole = sampler(seed, num_clusters=num_clusters, batch=batch)
    t, cluster = whole.draw(position, range(batch))
    parts = [whole.draw(position, places) for places in (range(cut), range(cut, batch))]
    assert np.array_equal(np.concatenate([part[0] for part in parts]), t)
    assert np.array_equal(np.concatenate([part[1] for part in parts]), cluster)


@settings(deadline=None, max_examples=30)
@given(**batches)
def test_a_timestep_lies_in_its_cluster(seed, position, batch, num_clusters):
    timesteps = sampler(seed, num_clusters=num_clusters, batch=batch)
    t, cluster = timesteps.draw(position, range(batch))
    assert t.dtype == cluster.dtype == np.int64
    assert np.all(timesteps.boundaries[cluster] <= t)
    assert np.all(t < timesteps.boundaries[cluster + 1])


@settings(deadline=None, max_examples=30)
@given(**batches)
def test_counts_are_those_of_the_global_batch_and_even(seed, position, batch, num_clusters):
    timesteps = sampler(seed, num_clusters=num_clusters, batch=batch)
    counts = timesteps.counts_by_shift()[timesteps.shift(position)]
    assert counts.sum() == batch
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(counts, np.bincount(timesteps.clusters(position), minlength=num_clusters))


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 12))
def test_strata_are_equal_and_cover_the_range_alone(first, num_timesteps, num_strata):
    timesteps = range(first, first + num_timesteps)
    boundaries = timestep_strata(timesteps, num_strata)
    assert (boundaries[0], boundaries[-1]) == (timesteps.start, timesteps.stop)
    np.testing.assert_allclose(np.diff(boundaries), num_timesteps / num_strata, atol=1e-12)
    # A stratum's samples fall on t by the share of the stratum that lies in [t, t + 1).
    t = np.array(timesteps)[:, None]
    shares = np.minimum(boundaries[1:], t + 1) - np.maximum(boundaries[:-1], t)
    probability = (shares.clip(min=0) / np.diff(boundaries)).mean(axis=1)
    np.testing.assert_allclose(probability, 1 / num_timesteps, atol=1e-12)


@pytest.mark.parametrize(
    ("timesteps", "num_strata"), [(range(10), 3), (range(12), 4), (range(3, 10), 5), (range(2), 9)]
)
def test_timesteps_are_equally_likely_whatever_the_strata(timesteps, num_strata):
    strata = TimestepSampler(0, timestep_strata(timesteps, num_strata), num_strata)
    grid = (np.arange(7 * 9 * 100) + 0.5) / (7 * 9 * 100)
    t = np.concatenate([strata.at(np.full_like(grid, k, int), grid) for k in range(num_strata)])
    expected = len(t) / len(timesteps)
    assert np.bincount(t)[: timesteps.start].sum() == 0
    np.testing.assert_allclose(np.bincount(t)[timesteps.start :], expected, atol=num_strata)


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 40))
def test_rounding_never_reaches_the_next_cluster(num_timesteps, num_strata):
    strata = TimestepSampler(0, timestep_strata(range(num_timesteps), num_strata), 1)
    for k, (low, high) in enumerate(itertools.pairwise(strata.boundaries)):
        first, last = strata.at(np.array([k, k]), np.array([0.0, ALMOST_ONE]))
        assert np.floor(low) == first
        assert first <= last < min(high, num_timesteps)


def test_integer_clusters_keep_their_timesteps_apart():
    boundaries = np.array([0, 1, 7, 10])
    clusters = TimestepSampler(0, boundaries, 3)
    u = np.append(np.linspace(0, 1, 400, endpoint=False), ALMOST_ONE)
    for k, (start, end) in enumerate(itertools.pairwise(boundaries)):
        assert set(clusters.at(np.full(len(u), k), u)) == set(range(start, end))


def test_every_timestep_is_reached():
    timesteps = sampler(num_timesteps=10, num_clusters=3, batch=12)
    t = np.concatenate([timesteps.draw(12 * step, range(12))[0] for step in range(20)])
    assert set(t) == set(range(10))


def test_timesteps_are_uniform():
    timesteps = TimestepSampler(0, timestep_strata(range(16), 5), 32)
    t = np.concatenate([timesteps.draw(32 * step, range(32))[0] for step in range(100)])
    # 200 draws of each of 16 values: chi-square with up to 15 degrees of freedom, 99.9% below 38.
    counts = np.bincount(t, minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 38


def test_a_place_meets_every_cluster():
    timesteps = sampler(num_clusters=4, batch=16)
    assert {int(timesteps.clusters(16 * step)[0]) for step in range(40)} == {0, 1, 2, 3}


def test_salt_draws_again_in_the_same_cluster():
    (first, cluster), (again, same) = (sampler().draw(5, range(16), salt) for salt in (0, 1))
    assert np.array_equal(cluster, same)
    assert not np.array_equal(first, again)


def test_within_a_cluster_the_position_in_the_run_decides():
    def first_32(batch):
        timesteps = sampler(num_clusters=1, batch=batch)
        steps = range(32 // batch)
        return np.concatenate([timesteps.draw(batch * step, range(batch))[0] for step in steps])

    assert np.array_equal(first_32(batch=8), first_32(batch=16))


def test_data_workers_receive_it_by_pickle():
    original = sampler(seed=3)
    copy = pickle.loads(pickle.dumps(original))
    assert np.array_equal(copy.draw(9, range(16))[0], original.draw(9, range(16))[0])
