import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.diffusion.clusters import timestep_clusters
from dtr_scale.diffusion.timesteps import TimestepSampler

batches = {
    "seed": st.integers(0, 2**31),
    "step": st.integers(0, 2_000_000),
    "batch": st.integers(1, 40),
    "num_clusters": st.integers(1, 12),
}


def sampler(seed=0, num_timesteps=1000, num_clusters=8, batch=16):
    return TimestepSampler(seed, timestep_clusters(num_timesteps, num_clusters), batch)


@settings(deadline=None, max_examples=30)
@given(**batches, data=st.data())
def test_a_draw_does_not_depend_on_who_draws(seed, step, batch, num_clusters, data):
    cut = data.draw(st.integers(0, batch))
    whole = sampler(seed, num_clusters=num_clusters, batch=batch)
    t, cluster = whole.draw(step, range(batch))
    parts = [whole.draw(step, places) for places in (range(cut), range(cut, batch))]
    assert np.array_equal(np.concatenate([part[0] for part in parts]), t)
    assert np.array_equal(np.concatenate([part[1] for part in parts]), cluster)


@settings(deadline=None, max_examples=30)
@given(**batches)
def test_a_timestep_lies_in_its_cluster(seed, step, batch, num_clusters):
    timesteps = sampler(seed, num_clusters=num_clusters, batch=batch)
    t, cluster = timesteps.draw(step, range(batch))
    assert t.dtype == cluster.dtype == np.int64
    assert np.all(timesteps.boundaries[cluster] <= t)
    assert np.all(t < timesteps.boundaries[cluster + 1])


@settings(deadline=None, max_examples=30)
@given(**batches)
def test_counts_are_those_of_the_global_batch_and_even(seed, step, batch, num_clusters):
    timesteps = sampler(seed, num_clusters=num_clusters, batch=batch)
    counts = timesteps.counts(step)
    assert counts.sum() == batch
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(counts, np.bincount(timesteps.clusters(step), minlength=num_clusters))


def test_every_timestep_is_reached():
    timesteps = sampler(num_timesteps=10, num_clusters=3, batch=12)
    t = np.concatenate([timesteps.draw(step, range(12))[0] for step in range(20)])
    assert set(t) == set(range(10))


def test_timesteps_are_uniform():
    timesteps = sampler(num_timesteps=16, num_clusters=4, batch=32)
    t = np.concatenate([timesteps.draw(step, range(32))[0] for step in range(100)])
    # 200 draws of each of 16 values: chi-square with 12 degrees of freedom, 99.9% below 33.
    counts = np.bincount(t, minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 33


def test_a_place_meets_every_cluster():
    timesteps = sampler(num_clusters=4, batch=16)
    assert {int(timesteps.clusters(step)[0]) for step in range(40)} == {0, 1, 2, 3}


def test_salt_draws_again_in_the_same_cluster():
    (first, cluster), (again, same) = (sampler().draw(5, range(16), salt) for salt in (0, 1))
    assert np.array_equal(cluster, same)
    assert not np.array_equal(first, again)


def test_within_a_cluster_the_position_in_the_run_decides():
    def first_32(batch):
        timesteps = sampler(num_clusters=1, batch=batch)
        steps = range(32 // batch)
        return np.concatenate([timesteps.draw(step, range(batch))[0] for step in steps])

    assert np.array_equal(first_32(batch=8), first_32(batch=16))


def test_data_workers_receive_it_by_pickle():
    original = sampler(seed=3)
    copy = pickle.loads(pickle.dumps(original))
    assert np.array_equal(copy.draw(9, range(16))[0], original.draw(9, range(16))[0])
