"""Give prepared shards to any PyTorch program: by index, or as a stream of whole shards."""

import functools
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from dtr_scale.data.cache import GIB
from dtr_scale.data.manifest import read_manifest
from dtr_scale.data.order import GlobalOrder
from dtr_scale.data.reader import SampleReader
from dtr_scale.errors import DataError
from dtr_scale.storage.folder import open_folder

Item = tuple[Tensor, int | Tensor]
"""x_start float32 [C, H, W], and a class index or the tokens of a text float32 [L, D]."""

_CHUNK = 64  # samples that a stream reads at once
_WINDOW_SHARDS = 8


class ShardDataset(Dataset[Item]):
    """The samples of a split of prepared data, a local folder or s3://, by index.

    Each is (x_start, y) as training sees it, x_start in [-1, 1] or a scaled latent. As it stands it
    is the picture itself, the mean of its latent, and its first caption. With `draw` a latent is
    drawn from its posterior, and a caption from all; with `horizontal_flip` half of the samples are
    mirrored. These draws are torch's, which a DataLoader seeds in its workers.

    Each process opens files and connections of its own, so it goes with any number of workers,
    forked or spawned, and with DistributedSampler. In random order every shard is wanted at once:
    from s3:// take `stream`, or a `cache_dir` on a disk that holds `cache_gb`.
    """

    def __init__(
        self,
        url: str | Path,
        split: str = "train",
        *,
        draw: bool = False,
        horizontal_flip: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        cache_gb: float = 64.0,
    ) -> None:
        self._place = str(url), dict(storage_options or {})
        self._split = split
        self._draw, self._flip = draw, horizontal_flip
        self._cache = Path(cache_dir) if cache_dir else None, int(cache_gb * GIB)
        self.manifest = read_manifest(open_folder(*self._place), split)
        self.shard_samples = tuple(shard.samples for shard in self.manifest.split(split))
        self._ends = np.cumsum([0, *self.shard_samples])
        self._opened: tuple[int, SampleReader] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return several samples by one reading, as a DataLoader asks for its batches."""
        # A range takes indices below 0, and raises the IndexError by which a plain `for` ends.
        every = range(len(self))
        return self.read(self.locate(np.array([every[index] for index in indices], np.int64)))

    def locate(self, indices: np.ndarray) -> np.ndarray:
        """Return (shard, index in the shard) of each index, int64 [n, 2]."""
        shards = np.searchsorted(self._ends, indices, side="right") - 1
        return np.stack([shards, indices - self._ends[shards]], axis=1)

    def stream(
        self,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> "ShardStream":
        """Return the same samples as a stream, which reads each shard by one rank and worker."""
        return ShardStream(self, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)

    def read(self, located: np.ndarray) -> list[Item]:
        """Return the samples at `located` int [n, 2]."""
        count = len(located)
        caption = torch.rand(count, dtype=torch.float64) if self._draw else torch.zeros(count)
        mirrored = torch.rand(count) < (0.5 if self._flip else 0.0)
        # Copied below: the reader's next call fills the same memory.
        views = self.samples.read_views(located, mirrored.numpy(), caption.double().numpy())
        x_start = self._decode(torch.from_numpy(views.stored), mirrored)
        if views.conditions.ndim == 1:
            return list(zip(x_start, views.conditions.tolist(), strict=True))
        return list(zip(x_start, torch.from_numpy(views.conditions.copy()), strict=True))

    @property
    def samples(self) -> SampleReader:
        """What reads the shards in this process."""
        # Threads and connections do not outlive a fork: an inherited reader would wait for them.
        if self._opened is None or self._opened[0] != os.getpid():
            cache_dir, cache_bytes = self._cache
            reader = SampleReader(
                open_folder(*self._place),
                self.manifest,
                self._split,
                window_shards=_WINDOW_SHARDS,
                cache_dir=cache_dir,
                cache_max_bytes=cache_bytes,
            )
            self._opened = os.getpid(), reader
            weakref.finalize(self, _close, *self._opened)
        return self._opened[1]

    def _decode(self, stored: Tensor, mirrored: Tensor) -> Tensor:
        manifest = self.manifest
        if manifest.encoding == "posterior":
            mean, std = (part.float() for part in stored.unbind(1))
            x_start = mean + std * torch.randn_like(mean) if self._draw else mean
        else:
            # The latent of a mirror image is stored; pixels are mirrored here.
            mirror = mirrored.view(-1, 1, 1, 1)
            x_start = torch.where(mirror, stored.flip(-1), stored).float()
        return x_start * manifest.scale_factor + manifest.shift


class ShardStream(IterableDataset[Item]):
    """The samples of a data set in an order that reads few shards at a time, each once an epoch.

    Ranks, by default those of `torch.distributed`, and the workers of a DataLoader share the
    samples; all ranks get equally many, so that up to `world_size` - 1 of an epoch are left out.
    Shards are shuffled, and their samples mixed within windows of eight. `set_epoch` before each
    epoch gives another order, in persistent workers as well.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._dataset = dataset
        self._shuffle, self._seed = shuffle, seed
        self._rank, self._world_size = _place_in_world(rank, world_size)
        if len(self) == 0:
            raise DataError(
                f"split of {len(dataset)} samples cannot be shared by {self._world_size} ranks; "
                "start fewer"
            )
        # In memory that workers share, which may live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, the same on all ranks."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Samples of this rank in an epoch."""
        return len(self._dataset) // self._world_size

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        num_samples, world_size = len(self._dataset), self._world_size
        begin = int(self._epoch) * num_samples
        # Lane l goes to rank l mod W, so that a rank has every W-th position whatever its workers.
        num_lanes, lane = world_size * num_workers, worker * world_size + self._rank
        first = begin + (lane - begin) % num_lanes
        positions = np.arange(first, begin + num_samples, num_lanes)
        first_of_rank = begin + (self._rank - begin) % world_size
        positions = positions[(positions - first_of_rank) // world_size < len(self)]
        order = GlobalOrder(
            self._dataset.shard_samples, self._seed, _WINDOW_SHARDS, num_lanes=num_lanes
        )
        for start in range(0, len(positions), _CHUNK):
            chunk = positions[start : start + _CHUNK]
            yield from self._dataset.read(self._located(order, lane, chunk, begin))

    def _located(
        self, order: GlobalOrder, lane: int, positions: np.ndarray, begin: int
    ) -> np.ndarray:
        if not self._shuffle:
            return self._dataset.locate(positions - begin)
        position = int(positions[0])
        ahead = functools.partial(order.shards_ahead, position, [lane])
        wanted = order.shards_of_two_windows(position, [lane])
        self._dataset.samples.prefetch(wanted, ahead)
        return order.samples(positions)


def _close(pid: int, reader: SampleReader) -> None:
    # A forked worker inherits the finalizer with the parent's reader, whose threads it lacks.
    if os.getpid() == pid:
        reader.close()


def _place_in_world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise DataError("give both rank and world_size, or neither")
    if rank is None or world_size is None:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return 0, 1
        return distributed.get_rank(), distributed.get_world_size()
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size} is not accepted; give 0 to {world_size - 1}")
    return rank, world_size
