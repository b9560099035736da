"""The position of a run goes on when its batch size changes: nothing comes twice, nothing never."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.data.batch import BatchAssembler, MicroBatch
from dtr_scale.data.loader import BatchLoader
from dtr_scale.data.order import GlobalOrder
from dtr_scale.data.synthetic import SyntheticSource
from dtr_scale.diffusion.timesteps import TimestepSampler

SAMPLES = SyntheticSource((1, 4, 4), num_classes=10, num_samples=50, seed=3)


def loader_of(batch, *, num_lanes=1, num_clusters=1, **ranks):
    """One cluster leaves the timestep of a sample to its position alone."""
    boundaries = np.linspace(0, 1000, num_clusters + 1).astype(np.int64)
    assembler = BatchAssembler(
        SAMPLES,
        GlobalOrder(SAMPLES.shard_samples, 7, window_shards=2, num_lanes=num_lanes),
        seed=7,
        global_batch_size=batch,
        draw_timesteps=TimestepSampler(7, boundaries, batch),
        class_dropout_prob=0.3,
        horizontal_flip=True,
    )
    return BatchLoader(assembler, **{"micro_batch_size": batch, **ranks})


def batch_at(position, batch, world_size, num_lanes):
    """Return what the ranks get together at a position, in the order of places."""
    parts, places = [], []
    for rank in range(world_size):
        size = batch // world_size
        ranks = {"rank": rank, "world_size": world_size, "micro_batch_size": size}
        loader = loader_of(batch, num_lanes=num_lanes, **ranks)
        loader.seek(position)
        parts.append(next(loader))
        places.append(loader.places.ravel())
    order = np.argsort(np.concatenate(places))
    return MicroBatch(*(torch.cat(fields)[order] for fields in zip(*parts, strict=True)))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.sampled_from([4, 8, 12, 20]), st.sampled_from([1, 2])), min_size=2),
    st.sampled_from([1, 2, 4]),
)
def test_draws_after_a_change_are_those_of_their_positions(batches, num_lanes):
    total = sum(batch for batch, _ in batches)
    expected = next(loader_of(total, num_lanes=num_lanes))
    places = np.argsort(loader_of(total, num_lanes=num_lanes).places.ravel())
    position, found = 0, []
    for batch, world_size in batches:
        found.append(batch_at(position, batch, world_size, num_lanes))
        position += batch
    for name, one, whole in zip(
        MicroBatch._fields, zip(*found, strict=True), expected, strict=True
    ):
        assert torch.equal(torch.cat(one), whole[places]), name


@pytest.mark.parametrize(("before", "after"), [(16, 64), (16, 8), (12, 20)])
def test_every_batch_after_a_change_has_even_clusters_and_a_shift_of_its_own(before, after):
    position, shifts = 5 * before, []
    for _ in range(30):
        loader = loader_of(after, num_clusters=4)
        loader.seek(position)
        cluster = next(loader).cluster
        timesteps = TimestepSampler(7, np.array([0, 250, 500, 750, 1000]), after)
        counts = timesteps.counts_by_shift()[timesteps.shift(position)]
        assert np.array_equal(np.bincount(cluster, minlength=4), counts)
        shifts.append(int(cluster[0]))
        position += after
    assert set(shifts) == {0, 1, 2, 3}


def test_the_first_samples_at_a_position_are_those_of_the_batch_that_begins_there():
    loader = loader_of(20, num_clusters=4)
    located, probed = loader.peek(28, 4)
    loader.seek(28)
    batch = next(loader)
    assert located == loader_of(4).peek(28, 4)[0]
    for name, one, other in zip(MicroBatch._fields, probed, batch, strict=True):
        assert torch.equal(one, other[:4]), name
