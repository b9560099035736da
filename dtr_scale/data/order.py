"""Order all samples of all epochs by a pure function of the shards' sizes and a seed.

Epoch -> permutation of the shards -> L contiguous runs of samples, one per lane -> permutation of
the samples inside windows of a run's shards. Place p of every global batch belongs to lane
p mod L, so the batch size must be a multiple of L. Every rank of any world size computes any
position without the ones before it and without the others; nothing has to be stored or told.

- Each sample comes exactly once per epoch; a global batch may span two epochs.
- A global batch depends on the seed, the sizes, L and the window, never on who reads it.
- A reader of one lane needs one window of shards at a time. Over an epoch of S shards of one size
  it needs S / L of them and one more: a shard on a boundary serves two lanes.
"""

import functools
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice, takewhile
from typing import NamedTuple

import numpy as np

from dtr_scale.randomness import keyed_generator

Positions = np.ndarray | range


def lane_major(global_batch_size: int, num_lanes: int) -> np.ndarray:
    """Return the places of a global batch in the order in which ranks share them, int64 [B].

    Lane after lane: consecutive ranks, and so the ranks of a node, read few lanes.
    """
    assert global_batch_size % num_lanes == 0
    return np.arange(global_batch_size).reshape(-1, num_lanes).T.ravel()


class Window(NamedTuple):
    """Shards whose samples are mixed with each other in one lane."""

    first: int
    """Position of its first sample."""
    shards: tuple[int, ...]


class _Epoch(NamedTuple):
    shards: np.ndarray  # int64 [S], shuffled
    # int64 [S + 1], where each begins among the epoch's samples, and the last ends
    ends: np.ndarray
    lanes: np.ndarray  # int64 [L + 1], where each lane's run begins, and the last ends


class _Run(NamedTuple):
    """The samples of one lane in one epoch: those at `low` to `high` of the shuffled shards."""

    first: int  # position of the first of them; the others follow L apart
    shards: np.ndarray  # int64 [n]
    begins: np.ndarray  # int64 [n], where each shard begins among the epoch's samples
    cuts: np.ndarray  # int64 [n + 1], the same and the last's end, cut to the run


# Hashed by identity (eq=False): `_epoch` keeps its results by order, and `_shuffled` changes.
@dataclass(frozen=True, eq=False)
class GlobalOrder:
    """Position (samples seen so far, over all ranks) -> shard and index in the shard.

    `shard_samples` are the sizes of the shards, `window_shards` how many shuffled shards are
    mixed with each other, `num_lanes` is L.
    """

    shard_samples: tuple[int, ...]
    seed: int
    window_shards: int = 8
    num_lanes: int = 1
    _shuffled: dict[int, tuple[int, int, np.ndarray]] = field(default_factory=dict, init=False)
    """The latest window of each lane: epoch, number, and what `_window_samples` returned."""

    @functools.cached_property
    def num_samples(self) -> int:
        """Samples per epoch."""
        return sum(self.shard_samples)

    def samples(self, positions: Positions) -> np.ndarray:
        """Return (shard, index in the shard) of each position, int64 [n, 2]."""
        positions = np.asarray(positions, np.int64)
        found = np.empty((len(positions), 2), np.int64)
        epochs, lanes = positions // self.num_samples, positions % self.num_lanes
        # A batch may span two epochs, and what a rank reads several lanes.
        for epoch, lane in sorted(set(zip(epochs.tolist(), lanes.tolist(), strict=True))):
            here = np.flatnonzero((epochs == epoch) & (lanes == lane))
            run = self._run(epoch, lane)
            nth = (positions[here] - run.first) // self.num_lanes
            starts = self._window_starts(run)
            windows = np.searchsorted(starts, nth, side="right") - 1
            for window in np.unique(windows).tolist():
                inside = windows == window
                shuffled = self._window_samples(epoch, lane, window)
                found[here[inside]] = shuffled[nth[inside] - starts[window]]
        return found

    def windows(self, lane: int, position: int) -> Iterator[Window]:
        """Yield the windows of a lane in the order of their use, from that of `position` on."""
        # The first position from here on that belongs to the lane.
        position += (lane - position) % self.num_lanes
        for epoch in count(position // self.num_samples):
            run = self._run(epoch, lane)
            starts = self._window_starts(run)
            nth = max(0, position - run.first) // self.num_lanes
            current = max(0, int(np.searchsorted(starts, nth, side="right")) - 1)
            for window in range(current, len(starts)):
                first = run.first + int(starts[window]) * self.num_lanes
                yield Window(first, tuple(run.shards[self._slice(window)].tolist()))

    def shards_of_two_windows(self, position: int, lanes: Iterable[int]) -> list[int]:
        """Return the shards of each lane's window at `position`, then those of the windows after.

        More than that no reader of these lanes has to hold.
        """
        # The lanes take turns: the first window of each is opened before the next of any.
        pairs = [islice(self.windows(lane, position), 2) for lane in lanes]
        windows = chain.from_iterable(zip(*pairs, strict=True))
        return list(dict.fromkeys(chain.from_iterable(window.shards for window in windows)))

    def shards_ahead(self, position: int, lanes: Iterable[int]) -> list[int]:
        """Return the shards that lanes need until the next epoch ends, in order of next use."""
        end = (position // self.num_samples + 2) * self.num_samples
        windows = heapq.merge(*(self.windows(lane, position) for lane in lanes))
        ahead = takewhile(lambda window: window.first < end, windows)
        return list(dict.fromkeys(chain.from_iterable(window.shards for window in ahead)))

    def _run(self, epoch: int, lane: int) -> _Run:
        shards, ends, lanes = _epoch(self, epoch)
        low, high = lanes[lane : lane + 2].tolist()
        # From the shard that holds sample `low` to the one that holds the last before `high`.
        start = int(np.searchsorted(ends, low, side="right")) - 1
        stop = int(np.searchsorted(ends, high, side="left")) if high > low else start
        begin = epoch * self.num_samples
        return _Run(
            first=begin + (lane - begin) % self.num_lanes,
            shards=shards[start:stop],
            begins=ends[start:stop],
            cuts=np.clip(ends[start : stop + 1], low, high),
        )

    def _slice(self, window: int) -> slice:
        return slice(window * self.window_shards, (window + 1) * self.window_shards)

    def _window_starts(self, run: _Run) -> np.ndarray:
        """Return which sample of a run is the first of each window, int64 [windows]."""
        return (run.cuts[: len(run.shards)] - run.cuts[:1])[:: self.window_shards]

    def _window_samples(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """Return the (shard, index) pairs of one window in their order, int32 [n, 2]."""
        # One window per lane is kept: a rank reads each of its lanes in the order of positions.
        latest = self._shuffled.get(lane)
        if latest is not None and latest[:2] == (epoch, window):
            return latest[2]
        run, inside = self._run(epoch, lane), self._slice(window)
        pieces = zip(
            run.shards[inside],
            run.begins[inside],
            run.cuts[:-1][inside],
            run.cuts[1:][inside],
            strict=True,
        )
        pairs = np.concatenate(
            [
                np.stack([np.full(end - low, shard), np.arange(low, end) - begin], axis=1)
                for shard, begin, low, end in pieces
            ]
        )
        # No run has more windows than this, so each (epoch, window) has a number of its own.
        most_windows = -(-len(self.shard_samples) // self.window_shards)
        stream_position = epoch * most_windows + window
        generator = keyed_generator(self.seed, "order.window", stream_position, salt=lane)
        shuffled = generator.permutation(pairs.astype(np.int32))
        self._shuffled[lane] = epoch, window, shuffled
        return shuffled


# Reading needs two epochs at a boundary, and `shards_ahead` looks into the one after.
@functools.lru_cache(maxsize=4)
def _epoch(order: GlobalOrder, epoch: int) -> _Epoch:
    """Return the shuffled shards of an epoch, and how its lanes share their samples."""
    num_shards, num_lanes = len(order.shard_samples), order.num_lanes
    shards = keyed_generator(order.seed, "order.shards", epoch).permutation(num_shards)
    ends = np.cumsum(np.asarray(order.shard_samples, np.int64)[shards])
    # As many samples as the epoch has positions p with p = lane (mod L).
    begin = epoch * order.num_samples
    offsets = (np.arange(num_lanes) - begin) % num_lanes
    counts = (order.num_samples - offsets + num_lanes - 1) // num_lanes
    return _Epoch(shards, np.append(0, ends), np.append(0, np.cumsum(counts)))
