"""Read samples of prepared shards at their offsets, without parsing a tar."""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dtr_scale.data.cache import GIB, choose_shards
from dtr_scale.data.finite import rows_not_finite
from dtr_scale.data.manifest import Manifest, data_errors
from dtr_scale.data.prefetch import Prefetcher
from dtr_scale.data.shards import OpenShard
from dtr_scale.data.split import Split
from dtr_scale.errors import DataError
from dtr_scale.storage.folder import Folder

Condition = int | np.ndarray
"""A class index, or a text's tokens float32 [L, D]."""

Sample = tuple[np.ndarray, Condition]
"""Stored array and condition."""

_TOKEN = np.dtype(np.float16)


class Views(NamedTuple):
    """The stored numbers and the conditions of n samples."""

    stored: np.ndarray  # [n, C, H, W]; of a posterior [n, 2, C, H, W], mean and standard deviation
    conditions: np.ndarray  # int64 [n], or float32 [n, L, D]


class Replaced(NamedTuple):
    """A sample that is not finite, and which of its shard took its place."""

    shard: str
    sample: int
    by: int


class Samples(Protocol):
    """Samples of one split by (shard, index): `SampleReader`, `SyntheticSource`."""

    manifest: Manifest
    shard_samples: tuple[int, ...]
    replaced: list[Replaced]
    """What was replaced since `taken` emptied the list."""

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
        """Return the condition that stands for no text, float32 [L, D]."""
        ...

    def prefetch(self, wanted: Sequence[int], next_uses: Callable[[], Sequence[int]]) -> None:
        """Hold these shards ready; `next_uses` tells in which order shards are needed again."""
        ...

    def close(self) -> None:
        """Close the files; they are opened again when needed."""
        ...


def taken(samples: Samples) -> list[Replaced]:
    """Return what was replaced since the last call."""
    replaced, samples.replaced = samples.replaced, []
    return replaced


class SampleReader:
    """The samples of one split of a prepared folder, by (shard, index in the shard).

    A sample is one read at a known offset of a shard. What is not as the manifest says raises a
    DataError. In the place of a sample whose stored numbers are not finite comes the nearest good
    sample before it in its shard, else the nearest after it: a function of the data alone, so the
    same at any world size and after any resume.
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
        self.split = Split(folder, manifest, split)
        self.shards = choose_shards(self.split, cache_dir, cache_max_bytes)
        self.shard_samples = tuple(shard.samples for shard in self.split.shards)
        self.replaced: list[Replaced] = []
        # The window that a lane is in and the next one.
        self._max_open = 2 * window_shards
        self._dtype = np.dtype(manifest.dtype)
        self._num_views = 2 if manifest.encoding == "posterior" else 1
        self._view_shape = manifest.stored_shape[self._num_views - 1 :]
        self._view_bytes = self._dtype.itemsize * int(np.prod(self._view_shape))
        self._caption_bytes = _TOKEN.itemsize * int(np.prod(manifest.context_shape or 0))
        self._begin()

    def _begin(self) -> None:
        self._prefetcher = Prefetcher(self.shards, self._max_open)
        self._buffers: dict[str, np.ndarray] = {}
        self._good: dict[tuple[int, int], int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prefetcher": None}  # threads and files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def read(self, shard: int, index: int) -> Sample:
        """Return the stored array and the condition (the first caption) of a sample."""
        self._prefetcher.get_whole(shard)
        if not self._is_good(shard, index):
            index = self._good_neighbour(shard, index)
        located, zero = np.array([[shard, index]]), np.zeros(1)
        stored, condition = [], 0
        for view in range(self._num_views):
            views = self.read_views(located, np.array([view]), zero)
            # The next call fills the same buffer.
            stored.append(views.stored.copy())
            condition = views.conditions[0]
        return np.concatenate(stored).reshape(self.manifest.stored_shape), condition

    def read_views(self, located: np.ndarray, mirrored: np.ndarray, caption: np.ndarray) -> Views:
        """Return the samples at `located` int [n, 2], valid until the next call (see `Samples`)."""
        try:
            return self._read_views(located, mirrored, caption)
        except OSError:
            # Of a request for single samples. The whole shard tells what is wrong.
            self._prefetcher.whole_only()
        with data_errors(self.split.folder, "a shard"):
            return self._read_views(located, mirrored, caption)

    def null_condition(self) -> np.ndarray:
        """Return the empty caption's tokens, zeros where the data has none, float32 [L, D]."""
        return self.split.null_condition()

    def check_sizes(self) -> None:
        """Look at every shard's size before training: DataError for one missing or cut short."""
        self.split.check_sizes()

    def prefetch(self, wanted: Sequence[int], next_uses: Callable[[], Sequence[int]]) -> None:
        """Hold these shards ready; `next_uses` tells in which order shards are needed again."""
        # The last are those of other nodes: needed by this job, but farthest away.
        every = range(len(self.shard_samples))
        self.shards.expect(lambda: dict.fromkeys(chain(next_uses(), every)))
        self._prefetcher.plan(wanted)

    def close(self) -> None:
        """Close the shards; they are opened again when needed."""
        self._prefetcher.close()
        self.shards.expect(tuple)

    def _read_views(self, located: np.ndarray, mirrored: np.ndarray, caption: np.ndarray) -> Views:
        places = {i: np.flatnonzero(located[:, 0] == i) for i in set(located[:, 0].tolist())}
        # All of them before the first is read: opening one may close others.
        opened = {i: self._prefetcher.get(i, places) for i in places}
        rows = np.empty((len(located), 4), np.int64)
        for i, here in places.items():
            rows[here] = opened[i].rows[located[here, 1]]
        reading = [(opened[i], here) for i, here in places.items()]
        # rows: [n, 4], see `dtr_scale.prepare.writer`. Of a posterior's two views one is read.
        offsets = rows[:, 0] + mirrored * self._view_bytes * (self._num_views > 1)
        stored = self._fill("stored", reading, offsets, self._view_bytes)
        stored = stored.view(self._dtype).reshape(-1, *self._view_shape)
        bad = rows_not_finite(stored)
        conditions = rows[:, 1]
        if (shape := self.manifest.context_shape) is not None:
            nth = np.floor(caption * rows[:, 3]).astype(np.int64)
            offsets = rows[:, 2] + nth * self._caption_bytes
            tokens = self._fill("context", reading, offsets, self._caption_bytes).view(_TOKEN)
            bad = np.union1d(bad, rows_not_finite(tokens))
            conditions = tokens.reshape(-1, *shape).astype(np.float32)
        if len(bad):
            # Once at most: what takes the place is finite in all its views and captions.
            return self._read_views(self._replace(located, bad), mirrored, caption)
        return Views(stored, conditions)

    def _fill(
        self,
        name: str,
        reading: Sequence[tuple[OpenShard, np.ndarray]],
        offsets: np.ndarray,
        num_bytes: int,
    ) -> np.ndarray:
        """Return the bytes at offsets [n], each in the shard of its place, uint8 [n, num_bytes]."""
        # Kept from call to call, which is why what is returned is valid until the next one.
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[1] != num_bytes or len(buffer) < len(offsets):
            buffer = self._buffers[name] = np.empty((len(offsets), num_bytes), np.uint8)
        buffer = buffer[: len(offsets)]
        parts = list(buffer)
        ends = [
            shard.read(offsets[here].tolist(), [parts[place] for place in here.tolist()])
            for shard, here in reading
        ]
        # All requests are under way by now; in one loop each shard would wait for the one before.
        for end in ends:
            end()
        return buffer

    def _replace(self, located: np.ndarray, bad: np.ndarray) -> np.ndarray:
        """Return `located` with a good sample in each bad place."""
        located = located.copy()
        for place in bad.tolist():
            shard, index = located[place].tolist()
            good = self._good_neighbour(shard, index)
            self.replaced.append(Replaced(self.split.shards[shard].name, index, good))
            located[place, 1] = good
        return located

    def _good_neighbour(self, shard: int, index: int) -> int:
        """Return the nearest good sample before one in its shard, else the nearest after it."""
        if (shard, index) not in self._good:
            candidates = chain(range(index)[::-1], range(index + 1, self.shard_samples[shard]))
            good = next((near for near in candidates if self._is_good(shard, near)), None)
            if good is None:
                raise DataError(
                    f"shard {self.split.shards[shard].name} in {self.split.folder.url}: none of "
                    f"its {self.shard_samples[shard]} samples is finite (infinities or NaNs are "
                    "stored); fix: prepare the data again (dtr-scale prepare)"
                )
            self._good[shard, index] = good
        return self._good[shard, index]

    def _is_good(self, shard: int, index: int) -> bool:
        """Tell whether all numbers of a sample are finite, those of all views and captions."""
        opened = self._prefetcher.get(shard)
        at, _, captions_at, num_captions = opened.rows[index].tolist()
        stored = np.empty(self._num_views * self._view_bytes, np.uint8)
        captions = np.empty(num_captions * self._caption_bytes, np.uint8)
        opened.read([at], [stored])()
        opened.read([captions_at], [captions])()
        numbers = stored.view(self._dtype)[None], captions.view(_TOKEN)[None]
        return not any(len(rows_not_finite(each)) for each in numbers)
