"""From shards to micro-batches: reading samples, drawing what a step needs, worker processes.

Everything in a micro-batch is a function of (seed, position), position = step * B + place in the
global batch of B: the same at any world size, micro-batch size and number of workers.
"""

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dtr_scale.data.manifest import one_line
from dtr_scale.data.order import GlobalOrder
from dtr_scale.data.reader import Condition, Sample, Samples
from dtr_scale.errors import DataError, DtrScaleError
from dtr_scale.randomness import keyed_generator

_LEAVE_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}


class MicroBatch(NamedTuple):
    """What one micro-step of training needs, n samples."""

    x_start: torch.Tensor  # float32 [n, C, H, W]
    noise: torch.Tensor  # float32 [n, C, H, W]
    t: torch.Tensor  # int64 [n], timestep
    cluster: torch.Tensor  # int64 [n], cluster of the timestep
    y: torch.Tensor  # int64 [n], class index (num_classes: none); or tokens [n, L, D] (0: none)

    def to(self, device: torch.device) -> "MicroBatch":
        """Return it on a device; pinned memory is copied without waiting."""
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class TimestepDraw(Protocol):
    """Timesteps of places in the global batch; picklable."""

    def draw(self, step: int, places: range, salt: int = 0) -> tuple[Any, Any]:
        """Return (t, cluster), each int64 [len(places)]."""
        ...


class _Key(NamedTuple):
    step: int
    micro: int
    salt: int


class _MicroBatches(Dataset["MicroBatch | DtrScaleError"]):
    """Micro-batches of one rank by (step, micro-batch of the step, salt); runs in the workers."""

    def __init__(
        self,
        samples: Samples,
        order: GlobalOrder,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        first_place: int,
        draw_timesteps: TimestepDraw,
        conditioning: str,
        class_dropout_prob: float,
        horizontal_flip: bool,
    ) -> None:
        self.samples = samples
        self.order = order
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.first_place = first_place
        self.draw_timesteps = draw_timesteps
        self.conditioning = conditioning
        self.class_dropout_prob = class_dropout_prob
        self.horizontal_flip = horizontal_flip
        self._prefetched: tuple[int, ...] = ()

    def __getitem__(self, key: _Key) -> "MicroBatch | DtrScaleError":
        """Return the micro-batch; our own errors come as values, so that they stay one line."""
        try:
            return self._assemble(key)
        except DtrScaleError as error:
            return error

    def _assemble(self, key: _Key) -> MicroBatch:
        first = self.first_place + key.micro * self.micro_batch_size
        self._prefetch(key.step * self.global_batch_size + first)
        return self.assemble(key.step, range(first, first + self.micro_batch_size), key.salt)

    def assemble(self, step: int, places: range, salt: int) -> MicroBatch:
        """Return what `places` of the global batch of a step hold."""
        start = step * self.global_batch_size + places.start
        shape = (len(places), *self.samples.manifest.shape)
        x_start = np.empty(shape, np.float32)
        noise = np.empty(shape, np.float32)
        y: list[Condition] = []
        located = self.order.samples(start, start + len(places))
        for i, (shard, index) in enumerate(located):
            x_start[i], condition = self._sample(shard, index, start + i, salt)
            y.append(condition)
            generator = keyed_generator(self.seed, "noise", start + i, salt)
            generator.standard_normal(out=noise[i], dtype=np.float32)
        t, cluster = self.draw_timesteps.draw(step, places, salt)
        return MicroBatch(
            x_start=torch.from_numpy(x_start),
            noise=torch.from_numpy(noise),
            t=torch.from_numpy(np.array(t, np.int64)),
            cluster=torch.from_numpy(np.array(cluster, np.int64)),
            y=torch.from_numpy(np.stack(y)),
        )

    def _sample(self, shard: int, index: int, position: int, salt: int) -> Sample:
        """Return (x_start, condition) after the draws of flip, posterior and label drop."""
        draw = functools.partial(keyed_generator, self.seed, position=position, salt=salt)
        manifest = self.samples.manifest
        stored, condition = self.samples.read(shard, index)
        mirrored = self.horizontal_flip and draw("flip").random() < 0.5
        posterior = draw("posterior") if manifest.encoding == "posterior" else None
        if self.conditioning == "none":
            condition = 0
        elif self.class_dropout_prob and draw("label_drop").random() < self.class_dropout_prob:
            is_text = isinstance(condition, np.ndarray)
            condition = np.zeros_like(condition) if is_text else manifest.num_classes
        return manifest.decode(stored, mirrored=mirrored, generator=posterior), condition

    def _prefetch(self, position: int) -> None:
        shards = self.order.shards_ahead(position)
        if shards != self._prefetched:
            self._prefetched = shards
            self.samples.prefetch(shards)


class _Keys(Sampler[_Key]):
    """The keys of a rank's micro-batches from a step on, for ever."""

    def __init__(self, step: int, grad_accum_steps: int, salt: int) -> None:
        self._step = step
        self._grad_accum_steps = grad_accum_steps
        self._salt = salt

    def __iter__(self) -> Iterator[_Key]:
        step = self._step
        while True:
            for micro in range(self._grad_accum_steps):
                yield _Key(step, micro, self._salt)
            step += 1


class BatchLoader:
    """Yields the micro-batches of one rank for ever, `grad_accum_steps` of them per step.

    Rank r of W owns the places [r B/W, (r+1) B/W) of each global batch of B. `num_workers` 0
    reads in this process; otherwise spawned processes read ahead, `prefetch` micro-batches each.
    They leave signals to this process, which must call `close()` (or use the loader in `with`).
    With `conditioning` "none" every label is 0.
    """

    def __init__(
        self,
        samples: Samples,
        order: GlobalOrder,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        draw_timesteps: TimestepDraw,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        conditioning: str = "class",
        class_dropout_prob: float = 0.0,
        horizontal_flip: bool = False,
        prefetch: int = 4,
    ) -> None:
        rank_batch_size = global_batch_size // world_size
        assert rank_batch_size * world_size == global_batch_size
        assert rank_batch_size % micro_batch_size == 0
        assert order.shard_samples == samples.shard_samples
        self.samples = samples
        self.grad_accum_steps = rank_batch_size // micro_batch_size
        self.global_batch_size = global_batch_size
        self._dataset = _MicroBatches(
            samples,
            order,
            seed=seed,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            first_place=rank * rank_batch_size,
            draw_timesteps=draw_timesteps,
            conditioning=conditioning,
            class_dropout_prob=class_dropout_prob,
            horizontal_flip=horizontal_flip,
        )
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._batches: Iterator[MicroBatch | DtrScaleError] | None = None
        self.seek(0)

    def seek(self, samples_seen: int, salt: int = 0) -> None:
        """Continue with the step at `samples_seen`; another `salt` re-draws all but the order."""
        step, rest = divmod(samples_seen, self.global_batch_size)
        assert rest == 0
        self.close()
        self._keys = _Keys(step, self.grad_accum_steps, salt)

    def peek(self, samples_seen: int, count: int) -> tuple[list[list[int]], MicroBatch]:
        """Return the first samples of the step at `samples_seen`, whichever rank's they are.

        They are at most `count`, as [shard, index], and as a micro-batch read in this process.
        """
        places = range(min(count, self.global_batch_size))
        step = samples_seen // self.global_batch_size
        located = self._dataset.order.samples(samples_seen, samples_seen + len(places))
        try:
            return [list(place) for place in located], self._dataset.assemble(step, places, 0)
        finally:
            if self._num_workers:
                self.samples.close()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        """Return the next micro-batch; DataError if the data or a worker failed."""
        if self._batches is None:
            self._batches = self._start()
        try:
            batch = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            # torch says "Caught" of what a worker raised; the rest is a connection to a dead one.
            if not self._num_workers or "Caught " in str(error):
                raise
            raise DataError(
                f"a data worker was killed ({one_line(error)}); fix: give the job more memory, or "
                f"lower data.num_workers (now {self._num_workers})"
            ) from error
        if isinstance(batch, DtrScaleError):
            raise batch
        return batch

    def close(self) -> None:
        """End the workers; the loader can be used again after a `seek`."""
        # Dropping the iterator is not enough: a caught exception may still hold it.
        getattr(self._batches, "_shutdown_workers", lambda: None)()
        self._batches = None
        self._dataset.samples.close()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> Iterator["MicroBatch | DtrScaleError"]:
        workers: dict[str, Any] = {}
        if self._num_workers:
            workers = {
                "multiprocessing_context": "spawn",  # s3fs and threads do not survive a fork
                "prefetch_factor": self._prefetch,
                "worker_init_fn": functools.partial(_obey_parent_only, os.getpid()),
            }
        loader = DataLoader(
            self._dataset,
            sampler=self._keys,
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
            **workers,
        )
        with _starting_workers() if self._num_workers else contextlib.nullcontext():
            return iter(loader)


@contextlib.contextmanager
def _starting_workers() -> Iterator[None]:
    """Start workers that requests to leave do not reach, and keep torch out of SIGCHLD.

    A launcher signals the whole process tree, the main process decides what that means: workers,
    and Python's resource tracker that comes with them, inherit the signals blocked. torch's
    SIGCHLD handler would raise a RuntimeError anywhere in the main thread when a worker dies;
    without it the next batch raises, after 5 s at most.
    """
    on_child_exit = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEAVE_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _LEAVE_SIGNALS)  # its start unblocks some
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_child_exit)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_parent_only(parent_pid: int, _worker_id: int) -> None:
    """End this worker when its main process sends SIGTERM or is gone; ignore what others send."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            received = signal.sigtimedwait({signal.SIGTERM}, 5.0)
            if received is not None and received.si_pid == parent_pid:
                break
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
