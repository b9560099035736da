"""Yield the micro-batches of one rank, read ahead by worker processes.

Workers write into memory that they share with the main process, which copies a micro-batch out
before its place is used again: a fifth of what it costs to send tensors from process to process.
"""

import contextlib
import functools
import itertools
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dtr_scale.data.batch import BatchAssembler, MicroBatch
from dtr_scale.data.manifest import one_line
from dtr_scale.data.order import lane_major
from dtr_scale.data.reader import Replaced, taken
from dtr_scale.data.workers import obey_parent_only, shared, starting_workers
from dtr_scale.errors import DataError, DtrScaleError

_logger = logging.getLogger(__name__)


class _Key(NamedTuple):
    samples_seen: int  # before the global batch
    micro: int
    salt: int
    slot: int


class _Read(NamedTuple):
    """A micro-batch or its error, as a worker hands it to the main process."""

    batch: "MicroBatch | int | DtrScaleError"  # the number of its slot, if it has one
    replaced: Sequence[Replaced]


class _MicroBatches(Dataset[_Read]):
    """Micro-batches of one rank by (position, number in its step, salt); runs in the workers.

    `places` int [micro-batches of a step, n] are the rank's, `node_lanes` those of its node.
    With `slots`, [slots, n, ...], a micro-batch is written there and only the slot returned.
    """

    def __init__(
        self,
        assembler: BatchAssembler,
        places: np.ndarray,
        node_lanes: Sequence[int],
        slots: MicroBatch | None,
    ) -> None:
        self._assembler = assembler
        self._places = places
        self._node_lanes = np.array(node_lanes)
        self._slots = slots
        self._wanted: list[int] = []

    def __getitem__(self, key: _Key) -> _Read:
        """Return the micro-batch; our own errors come as values, so that they stay one line."""
        batch = self._read(key)
        return _Read(batch, taken(self._assembler.samples))

    def _read(self, key: _Key) -> "MicroBatch | int | DtrScaleError":
        out = None if self._slots is None else MicroBatch(*(t[key.slot] for t in self._slots))
        try:
            self._prefetch(key.samples_seen)
            places = self._places[key.micro]
            batch = self._assembler.assemble(key.samples_seen, places, key.salt, out)
        except DtrScaleError as error:
            return error
        return batch if out is None else key.slot

    def _prefetch(self, position: int) -> None:
        order = self._assembler.order
        # This rank's lanes are opened. The cache is the node's, and evicts by all of its lanes.
        lanes, node_lanes = (
            np.unique((position + places) % order.num_lanes).tolist()
            for places in (self._places, self._node_lanes)
        )
        wanted = order.shards_of_two_windows(position, lanes)
        if wanted != self._wanted:
            self._wanted = wanted
            # A call for when something is evicted: it goes through two epochs of windows.
            ahead = functools.partial(order.shards_ahead, position, node_lanes)
            self._assembler.samples.prefetch(wanted, ahead)


class _Keys(Sampler[_Key]):
    """The keys of a rank's micro-batches from the `first` of a step on; slots go round.

    The global batches of B follow each other from `samples_seen` on, wherever that is.
    """

    def __init__(
        self,
        samples_seen: int,
        global_batch_size: int,
        *,
        first: int,
        grad_accum_steps: int,
        salt: int,
        num_slots: int,
    ) -> None:
        self._samples_seen = samples_seen
        self._global_batch_size = global_batch_size
        self._first = first
        self._grad_accum_steps = grad_accum_steps
        self._salt = salt
        self._num_slots = num_slots

    def __iter__(self) -> Iterator[_Key]:
        for number in itertools.count(self._first):
            steps, micro = divmod(number, self._grad_accum_steps)
            samples_seen = self._samples_seen + steps * self._global_batch_size
            # A slot comes again after all others, when its micro-batch has long been copied out.
            yield _Key(samples_seen, micro, self._salt, number % self._num_slots)


class BatchLoader:
    """Yields the micro-batches of one rank for ever, `grad_accum_steps` of them per step.

    The ranks share the places of each global batch in the order of `lane_major`; `node_ranks` are
    those that share this node's cache. `num_workers` 0 reads in this process; otherwise spawned
    processes read ahead, `prefetch` micro-batches each, and only the first micro-batch is read
    here, while they start. They leave signals to this process, which must call `close()` (or use
    the loader in `with`).
    """

    def __init__(
        self,
        assembler: BatchAssembler,
        *,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        node_ranks: range | None = None,
        num_workers: int = 0,
        prefetch: int = 4,
    ) -> None:
        global_batch_size, num_lanes = assembler.global_batch_size, assembler.order.num_lanes
        rank_batch_size = global_batch_size // world_size
        assert rank_batch_size * world_size == global_batch_size
        assert rank_batch_size % micro_batch_size == 0
        self.samples = assembler.samples
        self.grad_accum_steps = rank_batch_size // micro_batch_size
        self.global_batch_size = global_batch_size
        # int64 [world_size, places of a rank], lane after lane: a rank reads few lanes.
        by_rank = lane_major(global_batch_size, num_lanes).reshape(world_size, -1)
        self.places = by_rank[rank].reshape(self.grad_accum_steps, micro_batch_size)
        node_ranks = node_ranks or range(rank, rank + 1)
        self._node_lanes = np.unique(by_rank[node_ranks] % num_lanes).tolist()
        self._assembler = assembler
        self._num_workers = num_workers
        self._prefetch = prefetch
        # One more than workers may be told to fill: the one that is being copied out.
        self._num_slots = num_workers * prefetch + 1
        self._slots: MicroBatch | None = None
        self.num_replaced = 0
        """Places that were given to another sample, because their own is not finite."""
        self._told: set[tuple[str, int]] = set()
        self._batches: Iterator[_Read] | None = None
        self.seek(0)

    def seek(self, samples_seen: int, salt: int = 0) -> None:
        """Continue at a position, of any batch size; another `salt` re-draws all but the order."""
        # Workers have read ahead from the old position.
        self.close()
        self._samples_seen, self._salt = samples_seen, salt

    def peek(self, samples_seen: int, count: int) -> tuple[list[list[int]], MicroBatch]:
        """Return the first samples of the step at `samples_seen`, whichever rank's they are.

        They are at most `count`, as [shard, index], and as a micro-batch read in this process.
        """
        places = np.arange(min(count, self.global_batch_size))
        located = self._assembler.order.samples(samples_seen + places)
        return located.tolist(), self._read_here(samples_seen, places, 0)

    def sample_ids(self, samples_seen: int) -> list[tuple[str | int, int]]:
        """Return (shard, index) of the global batch at a position, all ranks' samples.

        A shard is named, or told by its number where samples are made up.
        """
        located = self._assembler.order.samples(samples_seen + np.arange(self.global_batch_size))
        names = [shard.name for shard in self.samples.manifest.split("train")]
        return [(names[shard] if names else shard, index) for shard, index in located.tolist()]

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        """Return the next micro-batch; DataError if the data or a worker failed."""
        if self._batches is None:
            self._batches = self._start()
            # Workers import torch for over a second. All is at hand here for the first one.
            if self._num_workers:
                return self._read_here(self._samples_seen, self.places[0], self._salt)
        try:
            batch, replaced = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            # torch says "Caught" of what a worker raised; the rest is a connection to a dead one.
            if not self._num_workers or "Caught " in str(error):
                raise
            raise DataError(
                f"a data worker was killed ({one_line(error)}); fix: give the job more memory, or "
                f"lower data.num_workers (now {self._num_workers})"
            ) from error
        self._tell(replaced)
        if isinstance(batch, DtrScaleError):
            raise batch
        return self._copied_out(batch) if isinstance(batch, int) else batch

    def _read_here(self, samples_seen: int, places: np.ndarray, salt: int) -> MicroBatch:
        try:
            return self._assembler.assemble(samples_seen, places, salt)
        finally:
            self._tell(taken(self.samples))
            # Workers read from here on, with shards and threads of their own.
            if self._num_workers:
                self.samples.close()

    def _tell(self, replaced: Sequence[Replaced]) -> None:
        """Count samples that others stand in for, and name each once."""
        self.num_replaced += len(replaced)
        for shard, sample, by in replaced:
            if (shard, sample) not in self._told:
                self._told.add((shard, sample))
                _logger.warning(
                    "sample %d of shard %s is not finite: sample %d takes its place "
                    "(samples replaced so far: %d); prepare the data again to mend it",
                    sample, shard, by, len(self._told),
                )  # fmt: skip

    def _copied_out(self, slot: int) -> MicroBatch:
        assert self._slots is not None
        # Pinning copies, too, and lets the copy to the GPU run beside the computation.
        if torch.cuda.is_available():
            return MicroBatch(*(tensor[slot].pin_memory() for tensor in self._slots))
        return MicroBatch(*(tensor[slot].clone() for tensor in self._slots))

    def close(self) -> None:
        """End the workers; the loader can be used again after a `seek`."""
        # Dropping the iterator is not enough: a caught exception may still hold it. The method is
        # private to torch's iterator, and absent without workers.
        getattr(self._batches, "_shutdown_workers", lambda: None)()
        self._batches = None
        self.samples.close()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> Iterator[_Read]:
        workers: dict[str, Any] = {}
        if self._num_workers:
            workers = {
                "multiprocessing_context": "spawn",  # s3fs and threads do not survive a fork
                "prefetch_factor": self._prefetch,
                "worker_init_fn": functools.partial(obey_parent_only, os.getpid()),
            }
            # Kept from seek to seek, so that /dev/shm is taken once.
            if self._slots is None:
                slots = self._assembler.empty(self._num_slots, self.places.shape[1])
                fix = f"lower data.num_workers (now {self._num_workers}) or train.micro_batch_size"
                self._slots = MicroBatch(*shared(slots, fix))
        with warnings.catch_warnings():
            # More workers than cores: the banner tells it once, torch twice on each rank.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader = DataLoader(
                _MicroBatches(self._assembler, self.places, self._node_lanes, self._slots),
                sampler=_Keys(
                    self._samples_seen,
                    self.global_batch_size,
                    first=1 if self._num_workers else 0,
                    grad_accum_steps=self.grad_accum_steps,
                    salt=self._salt,
                    num_slots=self._num_slots,
                ),
                # An item is a micro-batch already: torch must not collate several.
                batch_size=None,
                num_workers=self._num_workers,
                **workers,
            )
            with starting_workers() if self._num_workers else contextlib.nullcontext():
                return iter(loader)
