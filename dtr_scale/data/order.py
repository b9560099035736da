"""The global order of samples: a pure function of the shards' sizes and a seed.

Epoch -> permutation of the shards -> permutation of the samples inside windows of consecutive
shuffled shards. Every rank of any world size computes any position without the ones before it,
each sample comes exactly once per epoch, and a rank needs only one window of shards at a time.
"""

import functools
from dataclasses import dataclass

import numpy as np

from dtr_scale.randomness import keyed_generator


@dataclass(frozen=True)
class GlobalOrder:
    """Position (samples seen so far, over all ranks) -> (epoch, shard, index in the shard).

    `shard_samples` are the sizes of the shards, `window_shards` how many shuffled shards are
    mixed with each other. The order goes on for ever; a global batch may span two epochs.
    """

    shard_samples: tuple[int, ...]
    seed: int
    window_shards: int = 8

    @property
    def num_samples(self) -> int:
        """Samples per epoch."""
        return sum(self.shard_samples)

    def locate(self, position: int) -> tuple[int, int, int]:
        """Return (epoch, shard, index in the shard) of one position."""
        ((shard, index),) = self.samples(position, position + 1)
        return position // self.num_samples, shard, index

    def samples(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return (shard, index in the shard) of the positions [start, stop)."""
        found: list[tuple[int, int]] = []
        while start < stop:
            epoch, window, offset = self._window_of(start)
            piece = _shuffled_window(self, epoch, window)[offset : offset + stop - start]
            found += [(shard, index) for shard, index in piece.tolist()]
            start += len(piece)
        return found

    def shards_ahead(self, position: int) -> tuple[int, ...]:
        """Return the shards of the window at `position` and of the window after it."""
        epoch, window, _ = self._window_of(position)
        last = window + 1 == len(_epoch_windows(self, epoch)[0])
        following = (epoch + 1, 0) if last else (epoch, window + 1)
        shards = self._window_shards(epoch, window) + self._window_shards(*following)
        return tuple(dict.fromkeys(shards))

    def _window_of(self, position: int) -> tuple[int, int, int]:
        """Return (epoch, window, offset in the window)."""
        epoch, rest = divmod(position, self.num_samples)
        starts, _ = _epoch_windows(self, epoch)
        window = int(np.searchsorted(starts, rest, side="right")) - 1
        return epoch, window, rest - int(starts[window])

    def _window_shards(self, epoch: int, window: int) -> tuple[int, ...]:
        _, shuffled = _epoch_windows(self, epoch)
        first = window * self.window_shards
        return tuple(shuffled[first : first + self.window_shards].tolist())


@functools.lru_cache(maxsize=4)
def _epoch_windows(order: GlobalOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (first position of each window within the epoch, shuffled shards)."""
    num_shards = len(order.shard_samples)
    shuffled = keyed_generator(order.seed, "order.shards", epoch).permutation(num_shards)
    ends = np.cumsum(np.asarray(order.shard_samples, dtype=np.int64)[shuffled])
    starts = np.concatenate([[0], ends])[: num_shards : order.window_shards]
    return starts, shuffled


@functools.lru_cache(maxsize=4)
def _shuffled_window(order: GlobalOrder, epoch: int, window: int) -> np.ndarray:
    """Return the (shard, index) pairs of one window in their order, int64 [n, 2]."""
    pairs = np.concatenate(
        [
            np.stack([np.full(n, shard), np.arange(n)], axis=1)
            for shard in order._window_shards(epoch, window)
            for n in [order.shard_samples[shard]]
        ]
    )
    num_windows = -(-len(order.shard_samples) // order.window_shards)
    stream_position = epoch * num_windows + window
    return keyed_generator(order.seed, "order.window", stream_position).permutation(pairs)
