"""Reading samples of prepared shards at their offsets; no tar is parsed here."""

import os
from collections.abc import Callable, Sequence
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dtr_scale.data.cache import GIB, ShardCache
from dtr_scale.data.manifest import Manifest, data_errors
from dtr_scale.data.prefetch import OpenShards
from dtr_scale.data.shards import Split
from dtr_scale.storage.folder import Folder

Condition = int | np.ndarray
"""A class index, or a text's tokens float32 [L, D]."""

Sample = tuple[np.ndarray, Condition]
"""Stored array and condition."""


_MOST_BY_RANGE = 256
"""Samples that are fetched alone before a process waits for whole shards, which come 10x faster."""


class Views(NamedTuple):
    """What a batch of n samples is made of."""

    stored: np.ndarray  # [n, C, H, W]; of a posterior [n, 2, C, H, W], mean and standard deviation
    conditions: np.ndarray  # int64 [n], or float32 [n, L, D]


class Samples(Protocol):
    """Samples of one split by (shard, index): `SampleReader`, `SyntheticSource`."""

    manifest: Manifest
    shard_samples: tuple[int, ...]

    def read(self, shard: int, index: int) -> Sample:
        """Return the stored array and the condition (the first caption) of a sample."""
        ...

    def read_views(self, located: np.ndarray, mirrored: np.ndarray, caption: np.ndarray) -> Views:
        """Return the samples at `located` int [n, 2], valid until the next call.

        Of a posterior it is the image's or, where `mirrored` bool [n], its mirror image's. Of its
        captions it is the one at the fraction `caption` in [0, 1), float64 [n].
        """
        ...

    def null_condition(self) -> np.ndarray:
        """Return what stands for no text, float32 [L, D]."""
        ...

    def prefetch(self, wanted: Sequence[int], next_uses: Callable[[], Sequence[int]]) -> None:
        """Hold these shards ready; `next_uses` tells in which order shards are needed again."""
        ...

    def close(self) -> None:
        """Close the files; they are opened again when needed."""
        ...


class SampleReader:
    """The samples of one split of a prepared folder, by (shard, index in the shard).

    A sample is one read at a known offset of a whole, verified shard. Where reading begins, before
    whole shards have come from object storage, the first samples are fetched one by one; their
    shard is verified when it arrives. What is not as the manifest says raises a DataError.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        split: str = "train",
        *,
        window_shards: int = 8,
        cache_dir: Path | None = None,
        cache_max_bytes: int = 64 * GIB,
    ) -> None:
        self.manifest = manifest
        shards = manifest.split(split)
        self.shard_samples = tuple(shard.samples for shard in shards)
        self.cache = ShardCache(folder, shards, cache_dir, cache_max_bytes)
        self._split = Split(manifest, self.cache)
        self._max_open = 2 * window_shards
        self._dtype = np.dtype(manifest.dtype)
        self._num_views = 2 if manifest.encoding == "posterior" else 1
        self._view_shape = manifest.stored_shape[self._num_views - 1 :]
        self._view_bytes = self._dtype.itemsize * int(np.prod(self._view_shape))
        self._begin()

    def _begin(self) -> None:
        self._shelf = OpenShards(self._split.open, self._max_open)
        self._rows: dict[int, np.ndarray] = {}  # of shards that have not come yet
        self._by_range = _MOST_BY_RANGE
        self._buffers: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shelf": None}  # threads and files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def of_first_shards(self, num_shards: int) -> "SampleReader":
        """Return a reader of the first shards of the split alone."""
        cache = self.cache
        shards = cache.shards[:num_shards]
        return SampleReader(
            cache.folder,
            self.manifest.model_copy(update={"shards": shards}),
            shards[0].split,
            window_shards=self._max_open // 2,
            cache_dir=cache.files.path,
            cache_max_bytes=cache.files.max_bytes,
        )

    def read(self, shard: int, index: int) -> Sample:
        """Return the stored array and the condition (the first caption) of a sample."""
        self._shelf.get(shard)
        located, zero = np.array([[shard, index]]), np.zeros(1)
        stored, condition = [], 0
        for view in range(self._num_views):
            views = self.read_views(located, np.array([view]), zero)
            stored.append(views.stored.copy())
            condition = views.conditions[0]
        return np.concatenate(stored).reshape(self.manifest.stored_shape), condition

    def read_views(self, located: np.ndarray, mirrored: np.ndarray, caption: np.ndarray) -> Views:
        """Return the samples at `located` int [n, 2], valid until the next call (see `Samples`)."""
        try:
            return self._read_views(located, mirrored, caption)
        except OSError:
            # The whole shard tells what is wrong, and with which of them.
            self._by_range = 0
        with data_errors(self.cache.folder, "a shard"):
            return self._read_views(located, mirrored, caption)

    def null_condition(self) -> np.ndarray:
        """Return the empty caption's tokens, zeros where the data has none, float32 [L, D]."""
        return self._split.null_condition()

    def check_sizes(self) -> None:
        """Look at every shard's size before training: DataError for one missing or cut short."""
        self._split.check_sizes()

    def prefetch(self, wanted: Sequence[int], next_uses: Callable[[], Sequence[int]]) -> None:
        """Hold these shards ready; `next_uses` tells in which order shards are needed again."""
        shards = self.cache.shards

        def hashes() -> list[str]:
            order = dict.fromkeys(chain(next_uses(), range(len(shards))))
            return [shards[shard].sha256 for shard in order]

        self.cache.files.next_uses = hashes
        self._shelf.plan(wanted)

    def close(self) -> None:
        """Close the shards; they are opened again when needed."""
        self._shelf.close()
        self.cache.files.next_uses = tuple
        self._by_range = _MOST_BY_RANGE

    def _read_views(self, located: np.ndarray, mirrored: np.ndarray, caption: np.ndarray) -> Views:
        shards = located[:, 0].tolist()
        files: dict[int, FileIO | None] = {}
        rows = np.empty((len(located), 4), np.int64)
        needed = set(shards)
        for shard in needed:
            files[shard], index = self._find(shard, needed)
            here = located[:, 0] == shard
            rows[here] = index[located[here, 1]]
        offsets = rows[:, 0]
        if self._num_views > 1:
            offsets = offsets + mirrored * self._view_bytes
        content = self._fill("stored", shards, files, offsets, self._view_bytes)
        stored = content.view(self._dtype).reshape(-1, *self._view_shape)
        if self.manifest.context_shape is None:
            return Views(stored, rows[:, 1])
        num_bytes = 2 * int(np.prod(self.manifest.context_shape))
        offsets = rows[:, 2] + np.floor(caption * rows[:, 3]).astype(np.int64) * num_bytes
        tokens = self._fill("context", shards, files, offsets, num_bytes).view(np.float16)
        return Views(stored, tokens.reshape(-1, *self.manifest.context_shape).astype(np.float32))

    def _fill(
        self,
        name: str,
        shards: list[int],
        files: dict[int, FileIO | None],
        offsets: np.ndarray,
        num_bytes: int,
    ) -> np.ndarray:
        """Return the bytes at offsets [n] of shards [n], uint8 [n, num_bytes]."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[1] != num_bytes or len(buffer) < len(shards):
            buffer = self._buffers[name] = np.empty((len(shards), num_bytes), np.uint8)
        buffer = buffer[: len(shards)]
        away = []
        for row, shard, offset in zip(buffer, shards, offsets.tolist(), strict=True):
            file = files[shard]
            if file is None:
                away.append((row, shard, offset))
            elif (found := os.preadv(file.fileno(), [row], offset)) != num_bytes:
                raise self._split.error(shard, f"{num_bytes} bytes at {offset}", f"{found}")
        if away:
            self._by_range -= len(away)
            names = [self.cache.shards[shard].name for _, shard, _ in away]
            ranges = [(n, at, at + num_bytes) for n, (_, _, at) in zip(names, away, strict=True)]
            contents = self.cache.folder.read_ranges(ranges)
            for (row, shard, offset), content in zip(away, contents, strict=True):
                if len(content) != num_bytes:
                    raise self._split.error(
                        shard, f"{num_bytes} bytes at {offset}", f"{len(content)}"
                    )
                row[:] = np.frombuffer(content, np.uint8)
        return buffer

    def _find(self, shard: int, needed: set[int]) -> tuple[FileIO | None, np.ndarray]:
        """Return a shard's file, None while its samples are to be fetched alone, and its index.

        The files of the shards that are `needed` with it stay open.
        """
        opened = self._shelf.ready(shard)
        if opened is None and self._is_still_away(shard):
            if shard not in self._rows:
                self._rows[shard] = self._split.rows(shard)
            return None, self._rows[shard]
        self._rows.pop(shard, None)
        return opened or self._shelf.get(shard, needed)

    def _is_still_away(self, shard: int) -> bool:
        """Tell whether reading begins here and the shard has not come yet."""
        if self._by_range <= 0 or self.cache.folder.is_local or self.cache.at_hand(shard):
            return False
        return not self._shelf.has_failed(shard)
