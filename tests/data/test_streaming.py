"""Streaming from a real S3 server: ahead of need, bounded, and whatever the server does."""

import contextlib
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtr_scale.cli.main import main
from dtr_scale.data.batch import BatchAssembler, MicroBatch
from dtr_scale.data.loader import BatchLoader
from dtr_scale.data.manifest import read_manifest
from dtr_scale.data.order import GlobalOrder
from dtr_scale.data.reader import SampleReader
from dtr_scale.diffusion.timesteps import TimestepSampler
from dtr_scale.errors import DataError
from dtr_scale.prepare.writer import StoredSample
from dtr_scale.storage.folder import open_folder
from tests.support.runs import DEMO
from tests.support.shards import write_data

SHARDS, PER_SHARD, BATCH = 6, 100, 20
STEPS = SHARDS * PER_SHARD // BATCH
LATENTS = {
    "encoding": "posterior",
    "shape": (4, 32, 32),
    "dtype": "float16",
    "num_classes": 10,
}


def _latents() -> Iterator[StoredSample]:
    """Posteriors of 32 KB whose every number tells the sample."""
    for i in range(SHARDS * PER_SHARD):
        mean = np.full((2, 1, 4, 32, 32), i, np.float16)
        yield StoredSample(np.concatenate([mean, mean * 0], axis=1), i % 10)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """600 latents in 6 shards of 3.5 MB, in a local folder that no test writes to."""
    folder = open_folder(tmp_path_factory.mktemp("latents"))
    write_data(folder, _latents(), PER_SHARD, **LATENTS)
    return folder


@pytest.fixture
def bucket(source, s3_url):
    """The same on S3."""
    folder = open_folder(s3_url)
    for name in source.names():
        folder.write_bytes(name, source.read_bytes(name))
    yield folder
    folder.remove("")


@pytest.fixture
def proxied(bucket, s3_proxy):
    """The same through a proxy."""
    return open_folder(bucket.url, {"endpoint_url": s3_proxy.endpoint_url})


def _reader(folder, cache_dir, window_shards=2, **options):
    manifest = read_manifest(folder)
    return SampleReader(
        folder, manifest, window_shards=window_shards, cache_dir=cache_dir, **options
    )


def _loader(samples, window_shards=2, num_workers=1, num_lanes=1, **options):
    order = GlobalOrder(samples.shard_samples, 5, window_shards, num_lanes)
    timesteps = TimestepSampler(5, np.linspace(0, 1000, 9), BATCH)
    assembler = BatchAssembler(
        samples, order, seed=5, global_batch_size=BATCH, draw_timesteps=timesteps
    )
    whole: dict[str, Any] = {"micro_batch_size": BATCH} | options
    return BatchLoader(assembler, num_workers=num_workers, **whole)


def _take(loader, num_batches):
    batches = list(itertools.islice(loader, num_batches))
    return MicroBatch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


@pytest.fixture(scope="module")
def epoch(source):
    """The batches of the first epoch, read from the local folder in one process."""
    with _loader(_reader(source, None), num_workers=0) as loader:
        batches = _take(loader, STEPS)
    samples = batches.x_start[:, 0, 0, 0].long()
    assert sorted(samples.tolist()) == list(range(SHARDS * PER_SHARD))
    return batches


def _assert_is(found, expected):
    for name, one, other in zip(MicroBatch._fields, found, expected, strict=True):
        assert torch.equal(one, other), name


def _path(folder, name):
    return f"/{folder.url.removeprefix('s3://')}/{name}"


@pytest.mark.parametrize("cache_bytes", [2**30, 3 * 2**22, 0])
def test_an_epoch_is_the_same_from_object_storage(bucket, tmp_path, epoch, cache_bytes):
    """With a cache that holds all, two windows or nothing."""
    with _loader(_reader(bucket, tmp_path, cache_max_bytes=cache_bytes)) as loader:
        _assert_is(_take(loader, STEPS), epoch)
    kept = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert kept <= cache_bytes


def test_without_a_disk_two_windows_are_held_in_memory(bucket, tmp_path):
    with _loader(_reader(bucket, tmp_path, 1, cache_max_bytes=0), 1, num_workers=0) as loader:
        for _ in itertools.islice(loader, 2 * STEPS):
            assert len(_in_memory()) <= 3  # one may still arrive that is no longer needed
    assert not list(tmp_path.iterdir())


def _in_memory():
    """Return the names of the shards that this process has in memory."""
    names = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.add(str(descriptor.readlink()))
    return {name for name in names if name.startswith("/memfd:train-")}


def test_the_first_batches_do_not_wait_for_whole_shards(bucket, proxied, s3_proxy, tmp_path, epoch):
    middle = STEPS // 2
    reader = _reader(proxied, tmp_path)
    s3_proxy.cut_after_bytes, s3_proxy.cuts = 2**20, 10**6  # whole shards do not come
    with _loader(reader, num_workers=0) as loader:
        loader.seek(middle * BATCH)
        first = _take(loader, 3)
        assert not list(tmp_path.glob("*.tar"))
        s3_proxy.cuts = 0
        rest = _take(loader, STEPS - middle - 3)
        assert list(tmp_path.glob("*.tar"))
    found = [torch.cat(pair) for pair in zip(first, rest, strict=True)]
    _assert_is(found, [tensor[middle * BATCH :] for tensor in epoch])


def test_what_is_not_finite_is_replaced_before_whole_shards_come(s3_url, s3_proxy, tmp_path):
    latents = list(itertools.islice(_latents(), PER_SHARD))
    latents[5].array[0, 0, 0, 0, 0] = np.nan
    write_data(open_folder(s3_url), latents, PER_SHARD, **LATENTS)
    reader = _reader(open_folder(s3_url, {"endpoint_url": s3_proxy.endpoint_url}), tmp_path)
    s3_proxy.cut_after_bytes, s3_proxy.cuts = 2**20, 10**6  # whole shards do not come
    located = np.array([[0, 5], [0, 6]])
    views = reader.read_views(located, np.zeros(2, np.int64), np.zeros(2))
    assert views.stored[:, 0, 0, 0, 1].tolist() == [4, 6]
    assert not list(tmp_path.glob("*.tar"))
    reader.close()


def test_a_warm_cache_needs_no_server_but_for_the_manifest(bucket, tmp_path, epoch):
    with _loader(_reader(bucket, tmp_path), num_workers=0) as loader:
        _take(loader, STEPS)
    nowhere = {"endpoint_url": "http://127.0.0.1:9", "max_attempts": 1}
    away = SampleReader(
        open_folder(bucket.url, nowhere), read_manifest(bucket), window_shards=2, cache_dir=tmp_path
    )
    with _loader(away, num_workers=0) as loader:
        _assert_is(_take(loader, STEPS), epoch)


def test_two_jobs_on_one_cache_fetch_each_shard_once(proxied, s3_proxy, tmp_path, epoch):
    readers = [_reader(proxied, tmp_path) for _ in range(2)]
    with _loader(readers[0]) as one, _loader(readers[1]) as other:
        found = [(next(one), next(other)) for _ in range(STEPS)]
    for batches in zip(*found, strict=True):
        _assert_is([torch.cat(tensors) for tensors in zip(*batches, strict=True)], epoch)
    for shard in readers[0].split.shards:
        path = "GET", _path(proxied, shard.name)
        assert s3_proxy.transferred_bytes[path] < 2 * shard.bytes


def test_a_node_fetches_the_shards_of_its_lanes_alone(bucket, tmp_path):
    """Two nodes of one rank each: three shards and a boundary shard each, in an epoch."""
    for rank in range(2):
        reader = _reader(bucket, tmp_path / str(rank), 1)
        options: dict[str, Any] = {
            "num_lanes": 2,
            "rank": rank,
            "world_size": 2,
            "micro_batch_size": BATCH // 2,
        }
        with _loader(reader, 1, num_workers=0, **options) as loader:
            _take(loader, STEPS - 4)  # what is fetched ahead belongs to the next epoch then
    kept = [{path.name for path in (tmp_path / str(rank)).glob("*.tar")} for rank in range(2)]
    assert all(len(names) <= SHARDS // 2 + 1 for names in kept)
    assert len(kept[0] | kept[1]) == SHARDS


def test_a_server_killed_in_the_middle_of_a_shard_loses_no_sample(
    s3_server, proxied, s3_proxy, tmp_path, epoch
):
    def kill_and_restart():
        while sum(s3_proxy.transferred_bytes.values()) < 10 * 2**20:
            time.sleep(0.001)
        s3_server.stop()
        time.sleep(1)
        s3_server.start()

    killer = threading.Thread(target=kill_and_restart)
    with _loader(_reader(proxied, tmp_path)) as loader:
        killer.start()
        _assert_is(_take(loader, STEPS), epoch)
    killer.join()


@pytest.mark.parametrize(
    "fault", [("refusals", 7), ("lost_answers", 3), ("cuts", 4), ("delay_seconds", 0.2)], ids=str
)
def test_a_server_in_trouble_changes_nothing(proxied, s3_proxy, tmp_path, epoch, fault):
    s3_proxy.cut_after_bytes = 2**20
    with _loader(_reader(proxied, tmp_path), num_workers=0) as loader:
        setattr(s3_proxy, *fault)
        _assert_is(_take(loader, STEPS), epoch)
    assert s3_proxy.refusals == s3_proxy.lost_answers == s3_proxy.cuts == 0


def test_an_altered_shard_ends_the_epoch_by_name(bucket, tmp_path):
    """Even if its first samples were fetched one by one."""
    content = bytearray(bucket.read_bytes("train-000002.tar"))
    content[50_000] ^= 1
    bucket.write_bytes("train-000002.tar", bytes(content))
    for cache_bytes in (2**30, 0):
        reader = _reader(bucket, tmp_path, cache_max_bytes=cache_bytes)
        with (
            _loader(reader, num_workers=0) as loader,
            pytest.raises(
                DataError, match=r"^shard train-000002\.tar .*manifest says sha256 \w{64}"
            ),
        ):
            _take(loader, 2 * STEPS)


def test_wrong_keys_are_one_line_before_any_work_and_no_secret(bucket, tmp_path, capsys):
    options = {"key": "nobody", "secret": "very-secret"}
    command = ["train", "--config", str(DEMO), f"--data.shards={bucket.url}"]
    command += [f"--data.storage_options={json.dumps(options)}", f"--run_dir={tmp_path}/run"]
    assert main(command) == 2
    errors = capsys.readouterr().err.splitlines()
    (line,) = [line for line in errors if line.startswith("error: ")]
    assert "no access to manifest.json" in line
    assert "data.storage_options" in line
    assert not any("parameters" in line for line in errors)  # no network was built
    written = [path.read_text(errors="replace") for path in Path(tmp_path).rglob("*.*")]
    assert "very-secret" not in "\n".join(errors + written)


def test_a_forked_process_makes_its_own_connection(bucket):
    bucket.read_bytes("manifest.json")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def read():
        answers.put(len(bucket.read_bytes("manifest.json")))
        os._exit(0)  # without s3fs's farewell to connections that are not the child's

    child = context.Process(target=read)
    child.start()
    assert answers.get() == len(bucket.read_bytes("manifest.json"))
    child.join()


def test_a_worker_is_given_no_connection(bucket, tmp_path):
    """The main process has used its own; a worker is spawned and has to make one."""
    reader = _reader(bucket, tmp_path)
    reader.read(0, 0)
    with _loader(reader) as loader:
        next(loader)
        (worker,) = multiprocessing.active_children()
        assert type(worker).__module__ == "multiprocessing.context"
        assert type(worker).__name__ == "SpawnProcess"


@pytest.mark.slow
def test_memory_stays_flat_over_200000_samples(source, tmp_path):
    """Of the process that reads; 333 epochs with all that begins and ends with one."""
    with _loader(_reader(source, tmp_path), num_lanes=2) as loader:
        _take(loader, 10)
        (worker,) = multiprocessing.active_children()
        resident = []
        for _ in range(8):
            for _ in range(25_000 // BATCH):
                next(loader)
            resident.append([_resident_bytes(pid) for pid in (worker.pid, os.getpid())])
    growth = np.array(resident[-1]) - np.array(resident[1])
    assert growth.max() < 4 * 2**20


def _resident_bytes(pid):
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
