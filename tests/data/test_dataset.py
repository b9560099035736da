"""Prepared shards in a DataLoader: each sample once, by workers and ranks, as training sees it."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from dtr_scale import ShardDataset
from dtr_scale.data.manifest import read_manifest
from dtr_scale.data.reader import SampleReader
from dtr_scale.errors import DataError
from dtr_scale.prepare.writer import StoredSample
from dtr_scale.storage.folder import open_folder
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_data

PIXELS = {"encoding": "pixels", "shape": (1, 8, 8), "dtype": "uint8", "scale_factor": 1 / 127.5,
          "shift": -1.0, "num_classes": 103}  # fmt: skip


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """103 pixel samples in 9 shards; the class of each is its number."""
    path = tmp_path_factory.mktemp("numbered")
    gradient = np.arange(8, dtype=np.uint8) * 8 + np.zeros((1, 8, 1), np.uint8)
    samples = [StoredSample(gradient + np.uint8(i), i) for i in range(103)]
    write_data(open_folder(path), samples, 12, **PIXELS)
    return path


def classes(loader):
    return torch.cat([y for _, y in loader]).tolist()


def test_a_sample_is_what_training_reads(digits):
    dataset = ShardDataset(digits, "val")
    reader = SampleReader(open_folder(digits), read_manifest(open_folder(digits), "val"), "val")
    assert len(dataset) == 297
    stored, label = reader.read(0, 296)
    x_start, y = dataset[-1]
    assert (x_start.dtype, y) == (torch.float32, label)
    np.testing.assert_array_equal(x_start.numpy(), reader.manifest.decode(stored))
    reader.close()
    with pytest.raises(IndexError):
        dataset[297]
    with pytest.raises(DataError, match=r"has no split 'test'; accepted: train, val"):
        ShardDataset(digits, "test")


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_dataloader_reads_by_workers(numbered, context):
    dataset = ShardDataset(numbered)
    assert dataset[50][1] == 50, "read before the workers are started"
    options = {"multiprocessing_context": context}
    assert classes(DataLoader(dataset, 10, num_workers=2, **options)) == [*range(103)]
    stream = dataset.stream()
    mixed = classes(DataLoader(stream, 10, num_workers=2, **options))
    assert sorted(mixed) == [*range(103)] and mixed != sorted(mixed)


def test_workers_read_from_s3_with_connections_of_their_own(numbered, s3_url):
    there = open_folder(s3_url)
    for path in numbered.iterdir():
        there.write_bytes(path.name, path.read_bytes())
    dataset = ShardDataset(s3_url)
    assert dataset[50][1] == 50, "connected before the workers are forked"
    for source in (dataset, dataset.stream()):
        assert sorted(classes(DataLoader(source, 10, num_workers=2))) == [*range(103)]


def test_draws_and_mirrors_are_those_of_training(numbered, tmp_path):
    plain = torch.stack([x for x, _ in ShardDataset(numbered)])
    flipping = ShardDataset(numbered, horizontal_flip=True)
    torch.manual_seed(0)
    drawn = torch.stack([x for x, _ in flipping])
    mirrored = (drawn == plain.flip(-1)).flatten(1).all(1)
    as_it_is = (drawn == plain).flatten(1).all(1)
    assert (mirrored ^ as_it_is).all() and 30 < mirrored.sum() < 73

    # Of a posterior: mean 3 and its mirror image's 5, standard deviation 2.
    array = np.stack([np.full((2, 4, 4, 4), value, np.float16) for value in (3, 5)])
    array[:, 1] = 2
    told = {"encoding": "posterior", "shape": (4, 4, 4), "dtype": "float16", "scale_factor": 0.5}
    write_data(open_folder(tmp_path), [StoredSample(array)] * 200, 100, **told)
    mean = torch.stack([x for x, _ in ShardDataset(tmp_path)])
    assert (mean == 1.5).all()
    drawn = torch.stack([x for x, _ in ShardDataset(tmp_path, draw=True)])
    assert abs(drawn.mean() - 1.5) < 0.05 and abs(drawn.std() - 1.0) < 0.05
    flipped = torch.stack([x for x, _ in ShardDataset(tmp_path, horizontal_flip=True)])
    assert set(flipped.flatten(1).mean(1).tolist()) == {1.5, 2.5}


def test_texts_are_tokens(tmp_path):
    tokens = np.arange(2, dtype=np.float16)[:, None, None] + np.zeros((2, 3, 5), np.float16)
    samples = [StoredSample(np.zeros((1, 8, 8), np.uint8), 0, ("a", "b"), tokens)] * 50
    told = PIXELS | {"num_classes": 1, "context_shape": (3, 5)}
    write_data(open_folder(tmp_path), samples, 25, **told)
    x_start, y = next(iter(DataLoader(ShardDataset(tmp_path), 50)))
    assert (x_start.shape, y.shape) == ((50, 1, 8, 8), (50, 3, 5)) and not y.any()
    _, drawn = next(iter(DataLoader(ShardDataset(tmp_path, draw=True), 50)))
    assert set(drawn[:, 0, 0].tolist()) == {0.0, 1.0}, "any of its captions"


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_share_an_epoch(numbered, world_size, num_workers):
    dataset = ShardDataset(numbered)
    orders = []
    for epoch in (0, 1):
        seen = []
        for rank in range(world_size):
            stream = dataset.stream(rank=rank, world_size=world_size)
            stream.set_epoch(epoch)
            loader = DataLoader(stream, 10, num_workers=num_workers)
            mine = classes(loader)
            assert len(mine) == len(stream) == 103 // world_size
            seen += mine
        assert max(Counter(seen).values()) == 1 and len(seen) == 103 // world_size * world_size
        orders.append(seen)
    assert orders[0] != orders[1]
    plain = dataset.stream(shuffle=False, rank=0, world_size=world_size)
    assert classes(DataLoader(plain, 10)) == [*range(0, 103, world_size)][: len(plain)]


def test_persistent_workers_hear_of_the_epoch(numbered):
    stream = ShardDataset(numbered).stream()
    loader = DataLoader(stream, 10, num_workers=1, persistent_workers=True)
    first = classes(loader)
    assert classes(loader) == first
    stream.set_epoch(1)
    assert classes(loader) != first


def read_on_rank(numbered: str, out: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank, dataset = torch.distributed.get_rank(), ShardDataset(numbered)
    sampler = DistributedSampler(dataset, shuffle=True)
    by_index = classes(DataLoader(dataset, 10, sampler=sampler))
    streamed = classes(DataLoader(dataset.stream(), 10))
    np.savez(f"{out}/{rank}.npz", by_index=by_index, streamed=streamed)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_of_ddp_split_it(numbered, tmp_path):
    run_on_ranks(2, read_on_rank, str(numbered), str(tmp_path))
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    streamed = np.concatenate([rank["streamed"] for rank in ranks])
    assert len(streamed) == len(set(streamed.tolist())) == 102
    by_index = np.concatenate([rank["by_index"] for rank in ranks])
    assert sorted(set(by_index.tolist())) == [*range(103)]


def test_a_place_that_cannot_be_is_refused(numbered):
    dataset = ShardDataset(numbered)
    with pytest.raises(DataError, match="rank 2 of 2 is not accepted; give 0 to 1"):
        dataset.stream(rank=2, world_size=2)
    with pytest.raises(DataError, match="give both rank and world_size, or neither"):
        dataset.stream(rank=0)
    with pytest.raises(DataError, match="103 samples cannot be shared by 104 ranks"):
        dataset.stream(rank=0, world_size=104)
