"""Measure how fast an experiment's samples come on this machine, beside other ways to read them."""

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
from dtr_scale.data.batch import BatchAssembler
from dtr_scale.data.cache import GIB
from dtr_scale.data.loader import BatchLoader
from dtr_scale.data.manifest import read_manifest
from dtr_scale.data.reader import SampleReader
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.build import build_assembler, open_samples
from dtr_scale.logs import watched
from dtr_scale.storage.folder import open_folder

_WARM_UP_SECONDS = 1.0
_LEAST_BATCHES = 4
_ROWS = 9


class _WithoutDraws(BatchAssembler):
    """Takes a posterior's mean and no noise: what is left is reading and handing over."""

    def __init__(self, whole: BatchAssembler) -> None:
        # The same reader, order and streams: the rows differ by the draws alone.
        self.__dict__.update(whole.__dict__)

    def _normals(self, stream: str, positions: np.ndarray, salt: int, out: Tensor) -> None:
        out.zero_()


def bench_data(experiment: Experiment, seconds: float, num_shards: int) -> str:
    """Return the table for the first shards of an experiment's data.

    Each row is measured for so many seconds, "cold" for an epoch over these shards from a worker's
    first batch on, beginning with an empty cache. Caches are made inside the experiment's own and
    removed.
    """
    data = experiment.data
    if data.type == "synthetic":
        raise ConfigError("data.type = 'synthetic' has no shards to measure; set data.shards")
    if data.cache_dir:
        Path(data.cache_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=data.cache_dir) as cache_dir:
        lines = _Table(experiment, Path(cache_dir), num_shards, seconds).lines()
        return "\n".join(watched(lines, "rows of the table", _ROWS))


class _Table:
    def __init__(
        self, experiment: Experiment, cache_dir: Path, num_shards: int, seconds: float
    ) -> None:
        self._experiment = experiment
        self._cache_dir = cache_dir
        self._seconds = seconds
        open_samples(experiment)  # for its errors: the data must suit the model
        folder = open_folder(experiment.data.shards or "", experiment.data.storage_options)
        manifest = read_manifest(folder)
        shards = manifest.split("train")[:num_shards]
        self._folder = folder
        self._manifest = manifest.model_copy(update={"shards": shards})
        self._num_samples = sum(shard.samples for shard in shards)
        self._sample_bytes = sum(shard.bytes for shard in shards) / self._num_samples
        self._micro_batch_size = experiment.micro_batch_size(world_size=1)
        self._num_batches = self._num_samples // self._micro_batch_size
        if self._num_batches < _LEAST_BATCHES:
            raise ConfigError(
                f"{len(shards)} shards of {experiment.data.shards} hold {self._num_batches} "
                f"micro-batches of {self._micro_batch_size}, at least {_LEAST_BATCHES} are needed; "
                "raise --shards or lower --train.micro_batch_size"
            )

    def lines(self) -> Iterator[str]:
        yield (
            f"{self._experiment.data.shards}: {self._num_samples} samples of "
            f"{self._sample_bytes:.0f} bytes; micro-batches of {self._micro_batch_size}"
        )
        yield self._first_batch("first batch in mid-epoch, cold", cache="cold")
        # Fills the cache "epoch", from which the rows below read.
        with self._loader("epoch") as loader:
            for _ in range(2):  # the first comes from this process, the second from the worker
                next(loader)
            num_batches = self._num_batches - 2
            began = time.perf_counter()
            for _ in itertools.islice(loader, num_batches):
                pass
            rate = num_batches * self._micro_batch_size / (time.perf_counter() - began)
        yield self._row("cold, one worker", rate)
        yield self._first_batch("first batch in mid-epoch, warm", cache="epoch")
        num_workers = max(2, self._experiment.data.num_workers)
        for name, workers, draws in (
            ("warm, one worker, without draws", 1, False),
            ("warm, one worker", 1, True),
            (f"warm, {num_workers} workers", num_workers, True),
        ):
            with self._loader("epoch", workers, draws=draws) as loader:
                yield self._row(name, self._rate(loader, self._micro_batch_size), workers)
        paths = self._local_paths()
        batches = _webdataset(paths, self._micro_batch_size)
        rate = self._rate(batches, self._micro_batch_size)
        yield self._row("webdataset.WebDataset, one worker", rate)
        yield self._row("tarfile, in this process", self._rate(_tar_samples(paths), 1))

    def _loader(self, cache: str, workers: int = 1, *, draws: bool = True) -> BatchLoader:
        """Return a loader of the first shards with a cache of its own name."""
        data = self._experiment.data
        reader = SampleReader(
            self._folder,
            self._manifest,
            window_shards=data.window_shards,
            cache_dir=self._cache_dir / cache,
            cache_max_bytes=int(data.cache_gb * GIB),
        )
        assembler = build_assembler(self._experiment, reader)
        return BatchLoader(
            assembler if draws else _WithoutDraws(assembler),
            micro_batch_size=self._micro_batch_size,
            num_workers=workers,
        )

    def _first_batch(self, name: str, cache: str) -> str:
        batch_size = self._experiment.train.global_batch_size
        with self._loader(cache) as loader:
            began = time.perf_counter()
            # As a resume does, at a multiple of the batch size.
            loader.seek(self._num_samples // 2 // batch_size * batch_size)
            next(loader)
            return f"{name:42}{time.perf_counter() - began:10.2f} s"

    def _row(self, name: str, rate: float, workers: int = 1) -> str:
        figures = f"{rate:10.0f} samples/s{rate * self._sample_bytes / 1e6:9.1f} MB/s"
        return f"{name:42}{figures}" + (f"{rate / workers:10.0f} per worker" * (workers > 1))

    def _rate(self, batches: Iterable[Any], samples_per_batch: int) -> float:
        """Return samples/s after a second in which everything gets going."""
        iterator = iter(batches)
        deadline = time.perf_counter() + _WARM_UP_SECONDS
        while time.perf_counter() < deadline:
            next(iterator)
        began = time.perf_counter()
        for count in itertools.count(1):
            next(iterator)
            if (elapsed := time.perf_counter() - began) > self._seconds:
                return count * samples_per_batch / elapsed
        raise AssertionError("unreachable")

    def _local_paths(self) -> list[Path]:
        """Return where the shards lie on this machine, after fetching them if need be."""
        shards = self._manifest.shards
        if self._folder.is_local:
            return [self._folder.local_path / shard.name for shard in shards]
        paths = [self._cache_dir / "tars" / shard.name for shard in shards]
        for path in paths:
            self._folder.get(path.name, path)
        return paths


def _webdataset(paths: list[Path], batch_size: int) -> Iterator[Any]:
    """Yield batches of webdataset's documented pipeline, by its own loader in one worker."""
    from webdataset.compat import WebDataset, WebLoader

    # Absolute: webdataset runs a name that begins with "pipe:" in a shell.
    dataset: Any = WebDataset([str(path.absolute()) for path in paths], shardshuffle=len(paths))
    # These alone: left to itself it unpickles members that are named .pickle or .pth.
    dataset = dataset.shuffle(1000).decode(only=["npy", "cls"])
    dataset = dataset.to_tuple("npy", "cls").batched(batch_size)
    loader: Any = WebLoader(
        dataset.repeat(), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    return iter(loader)


def _tar_samples(paths: list[Path]) -> Iterator[np.ndarray]:
    """Yield one array after the other, read by `tarfile`."""
    for path in itertools.cycle(paths):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".npy") and (file := tar.extractfile(member)):
                    yield np.frombuffer(file.read(), np.uint8)
