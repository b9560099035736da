"""How fast an experiment's samples come on this machine, beside other ways to read its shards."""

import itertools
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dtr_scale.config.schema import Experiment
from dtr_scale.data.assembly import BatchAssembler
from dtr_scale.data.loader import BatchLoader
from dtr_scale.data.reader import SampleReader
from dtr_scale.errors import ConfigError
from dtr_scale.train.build import build_assembler, open_samples

_WARM_UP_SECONDS = 1.0


class _WithoutDraws(BatchAssembler):
    """The mean of a posterior, and no noise: what is left is reading and handing over."""

    def _normals(self, stream: str, positions: np.ndarray, salt: int, out: Tensor) -> None:
        out.zero_()


def bench_data(experiment: Experiment, seconds: float) -> str:
    """Return the table for an experiment's data; each row is measured for so many seconds.

    "cold" begins with an empty cache, which is made beside the experiment's own and removed.
    """
    data = experiment.data
    if data.type == "synthetic":
        raise ConfigError("data.type = 'synthetic' has no shards to measure; set data.shards")
    if data.cache_dir:
        Path(data.cache_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=data.cache_dir) as cache_dir:
        own_cache = data.model_copy(update={"cache_dir": cache_dir})
        return _table(experiment.model_copy(update={"data": own_cache}), seconds)


def _table(experiment: Experiment, seconds: float) -> str:
    num_workers = max(1, experiment.data.num_workers)
    reader = open_samples(experiment)
    assert isinstance(reader, SampleReader)
    shards = reader.cache.shards
    num_bytes, num_samples = sum(s.bytes for s in shards), sum(s.samples for s in shards)
    micro_batch_size = experiment.micro_batch_size(world_size=1)
    lines = [
        f"{experiment.data.shards}: {len(shards)} shards, {num_samples} samples of "
        f"{num_bytes / num_samples:.0f} bytes; micro-batches of {micro_batch_size}",
    ]

    def add(name: str, rate: float, workers: int = 1) -> None:
        figures = f"{rate:10.0f} samples/s{rate * num_bytes / num_samples / 1e6:9.1f} MB/s"
        each = f"{rate / workers:10.0f} per worker" if workers > 1 else ""
        lines.append(f"{name:42}{figures}{each}")

    for state in ("cold", "warm"):
        with _loader(experiment, num_workers=1) as loader:
            began = time.perf_counter()
            loader.seek(_middle(experiment, num_samples))
            next(loader)
            first = time.perf_counter() - began
            lines.append(f"{f'first batch in the middle, {state}':42}{first:10.2f} s")
            add(f"{state}, one worker", _rate(loader, micro_batch_size, seconds))
    with _loader(experiment, num_workers=1, kind=_WithoutDraws) as loader:
        add("warm, one worker, without draws", _rate(loader, micro_batch_size, seconds))
    if num_workers > 1:
        with _loader(experiment, num_workers) as loader:
            rate = _rate(loader, micro_batch_size, seconds)
            add(f"warm, {num_workers} workers", rate, num_workers)
    paths = _local_paths(experiment)
    batches = _webdataset(paths, micro_batch_size)
    add("webdataset.WebDataset, one worker", _rate(batches, micro_batch_size, seconds))
    add("tarfile, in this process", _rate(_tar_samples(paths), 1, seconds))
    return "\n".join(lines)


def _loader(
    experiment: Experiment, num_workers: int, kind: type[BatchAssembler] = BatchAssembler
) -> BatchLoader:
    return BatchLoader(
        build_assembler(experiment, open_samples(experiment), kind),
        micro_batch_size=experiment.micro_batch_size(world_size=1),
        num_workers=num_workers,
    )


def _middle(experiment: Experiment, num_samples: int) -> int:
    batch_size = experiment.train.global_batch_size
    return num_samples // 2 // batch_size * batch_size


def _rate(batches: Iterable[Any], samples_per_batch: int, seconds: float) -> float:
    """Return samples/s over so many seconds, after one in which everything gets going."""
    iterator = iter(batches)
    deadline = time.perf_counter() + _WARM_UP_SECONDS
    while time.perf_counter() < deadline:
        next(iterator)
    began = time.perf_counter()
    for count in itertools.count(1):
        next(iterator)
        if (elapsed := time.perf_counter() - began) > seconds:
            return count * samples_per_batch / elapsed
    raise AssertionError("unreachable")


def _local_paths(experiment: Experiment) -> list[Path]:
    """Return where some shards lie on this machine, after fetching them if need be."""
    cached = experiment.data.model_copy(update={"cache_gb": max(4.0, experiment.data.cache_gb)})
    reader = open_samples(experiment.model_copy(update={"data": cached}))
    assert isinstance(reader, SampleReader)
    return [reader.cache.fetch(shard) for shard in range(min(len(reader.cache.shards), 8))]


def _webdataset(paths: list[Path], batch_size: int) -> Iterator[Any]:
    """The pipeline of webdataset's documentation, with its own loader in one worker."""
    from webdataset.compat import WebDataset, WebLoader

    dataset: Any = WebDataset([str(path) for path in paths], shardshuffle=len(paths))
    dataset = dataset.shuffle(1000).decode().to_tuple("npy", "cls").batched(batch_size)
    loader: Any = WebLoader(
        dataset.repeat(), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    return iter(loader)


def _tar_samples(paths: list[Path]) -> Iterator[np.ndarray]:
    """One array after the other, as `tarfile` reads them."""
    for path in itertools.cycle(paths):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".npy") and (file := tar.extractfile(member)):
                    yield np.frombuffer(file.read(), np.uint8)
