"""A sample that is not finite costs its place in the epoch to a neighbour, and never the run."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.data.batch import BatchAssembler
from dtr_scale.data.finite import rows_not_finite
from dtr_scale.data.loader import BatchLoader
from dtr_scale.data.manifest import read_manifest
from dtr_scale.data.order import GlobalOrder
from dtr_scale.data.reader import SampleReader
from dtr_scale.diffusion.timesteps import TimestepSampler
from dtr_scale.errors import DataError
from dtr_scale.prepare.writer import StoredSample
from dtr_scale.storage.folder import open_folder
from tests.support.shards import write_data

SHARDS, PER_SHARD, BATCH = 3, 8, 12
BAD = {(0, 0), (0, 1), (1, 5), (1, 6), (2, 7)}
BY = {(0, 0): 2, (0, 1): 2, (1, 5): 4, (1, 6): 4, (2, 7): 6}
FAULTS = (np.inf, -np.inf, np.nan, -np.nan)


def _folder(path, bad, encoding: Any = "posterior", dtype: Any = "float16"):
    """Store samples whose numbers tell which they are, one number of each bad one not finite."""
    samples = []
    for shard in range(SHARDS):
        for index in range(PER_SHARD):
            array = np.full((2, 2, 1, 2, 2), PER_SHARD * shard + index, dtype)
            array[:, 1] = 0  # the standard deviation
            is_posterior = encoding == "posterior"
            if (shard, index) in bad:  # in both views, in the mean or in the deviation
                array[:, index % 2 * is_posterior, 0, 1, 1] = FAULTS[index % 4]
            array = array if is_posterior else array[0, 0]
            samples.append(StoredSample(array, label=PER_SHARD * shard + index))
    folder = open_folder(path)
    told = {"encoding": encoding, "shape": (1, 2, 2), "dtype": dtype}
    write_data(folder, samples, PER_SHARD, **told, num_classes=SHARDS * PER_SHARD)
    return folder


def _reader(folder):
    return SampleReader(folder, read_manifest(folder), cache_max_bytes=0)


def _loader(folder, num_workers=0, rank=0, world_size=1, micro_batch_size=BATCH, num_lanes=1):
    reader = _reader(folder)
    order = GlobalOrder(reader.shard_samples, 3, window_shards=2, num_lanes=num_lanes)
    timesteps = TimestepSampler(3, np.linspace(0, 1000, 9), BATCH)
    assembler = BatchAssembler(
        reader, order, seed=3, global_batch_size=BATCH, draw_timesteps=timesteps,
        horizontal_flip=True,
    )  # fmt: skip
    return BatchLoader(
        assembler, num_workers=num_workers, rank=rank, world_size=world_size,
        micro_batch_size=micro_batch_size,
    )  # fmt: skip


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    return _folder(tmp_path_factory.mktemp("spoilt"), BAD)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(1, 12), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1)]),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 3),
)
def test_a_good_neighbour_comes_in_its_place_at_any_world_size(spoilt, split, num_lanes, step):
    world_size, micro_batch_size = split
    order = GlobalOrder((PER_SHARD,) * SHARDS, 3, window_shards=2, num_lanes=num_lanes)
    located = order.samples(np.arange(BATCH) + step * BATCH).tolist()
    expected = [PER_SHARD * s + BY.get((s, i), i) for s, i in located]
    found, replaced = {}, 0
    for rank in range(world_size):
        with _loader(spoilt, 0, rank, world_size, micro_batch_size, num_lanes) as loader:
            loader.seek(step * BATCH)
            for places in loader.places:
                batch = next(loader)
                assert torch.equal(batch.x_start[:, 0, 0, 0].long(), batch.y)
                assert batch.x_start.isfinite().all()
                found |= dict(zip(places.tolist(), batch.y.tolist(), strict=True))
            replaced += loader.num_replaced
    assert [found[place] for place in range(BATCH)] == expected
    assert replaced == sum(tuple(place) in BAD for place in located)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_is_named_once_and_counted(spoilt, num_workers, warnings_of):
    with _loader(spoilt, num_workers) as loader:
        for _ in range(6):  # three epochs
            next(loader)
        assert loader.num_replaced == 3 * len(BAD)
    told = warnings_of("dtr_scale.data.loader")
    assert len(told) == len(BAD)
    for shard, sample in BAD:
        name = f"sample {sample} of shard train-{shard:06d}.tar is not finite"
        by = f"sample {BY[shard, sample]} takes its place"
        assert sum(name in line and by in line for line in told) == 1
    assert any("replaced so far: 5" in line for line in told)


@pytest.mark.parametrize(("encoding", "dtype"), [("posterior", "float32"), ("pixels", "float16")])
def test_every_kind_of_floats_is_checked(tmp_path, encoding, dtype):
    reader = _reader(_folder(tmp_path, {(0, 3)}, encoding, dtype))
    for sample, by in ((2, 2), (3, 2), (4, 4)):
        stored, label = reader.read(0, sample)
        assert np.isfinite(stored).all()
        assert label == by
    reader.close()


def test_a_shard_without_a_good_sample_is_an_error_by_name(tmp_path):
    folder = _folder(tmp_path, {(1, index) for index in range(PER_SHARD)})
    with (
        _loader(folder) as loader,
        pytest.raises(DataError, match=r"shard train-000001\.tar .* none of its 8 samples is fini"),
    ):
        for _ in range(4):
            next(loader)


@given(st.data(), st.sampled_from([np.float16, np.float32, np.float64]))
def test_what_is_not_finite_is_found(data, dtype):
    numbers = np.zeros((5, 6), dtype)
    limits = [np.finfo(dtype).max, np.finfo(dtype).min, -0.0, 1.0, *FAULTS]
    for row, column, value in data.draw(
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.sampled_from(limits)))
    ):
        numbers[row, column] = value
    expected = np.flatnonzero(~np.isfinite(numbers).all(1))
    np.testing.assert_array_equal(rows_not_finite(numbers), expected)
    assert len(rows_not_finite(numbers.view(np.uint8))) == 0
