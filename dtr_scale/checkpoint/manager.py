"""Save, load and retire the checkpoints of a run, all ranks together."""

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dtr_scale.checkpoint.catalog import Catalog
from dtr_scale.checkpoint.layout import kind_of, rank_file
from dtr_scale.checkpoint.reader import CheckpointReader, LoadPlan
from dtr_scale.checkpoint.retention import Keep, Retention
from dtr_scale.checkpoint.snapshot import Snapshot, have_room, own_share
from dtr_scale.engines.base import Piece
from dtr_scale.engines.world import World
from dtr_scale.errors import CheckpointError, DamagedCheckpointError, UnsavedError
from dtr_scale.storage.folder import Folder

log = logging.getLogger(__name__)

_LAST_SAVE_SECONDS = 60.0


class CheckpointManager:
    """The checkpoints in one folder, local or s3://, as all ranks of a run see them.

    `save` returns when the state is copied to host memory, or stored where there is no room for a
    copy; on a GPU when the copy is queued (see `before_change`). A thread on each rank writes it,
    and the threads agree among themselves. The loop learns how it went at the next `save` or
    `wait`, where all ranks learn the same.
    """

    def __init__(
        self, folder: Folder, *, world: World, keep: Keep | None = None, max_failures: int = 3
    ) -> None:
        self.saved_step: int | None = None
        """Step of the newest complete checkpoint, loaded or saved."""
        self.before_commit: Callable[[], None] = lambda: None
        """Called on rank 0, in the thread, when all is stored but the mark that makes it count."""
        self.on_saved: Callable[[int], None] = lambda step: None
        """Called on rank 0, in the thread, with the step of a checkpoint that is complete."""
        self._folder = folder
        self._catalog = Catalog(folder)
        self._retention = Retention(self._catalog, keep or Keep())
        self._world = world
        # The threads' own gloo group: while they agree, the loop's collectives run on its group.
        self._threads = world.in_background()
        self._max_failures = max_failures
        # Written by the thread, read by the loop after it has joined the thread: no lock.
        self._failures: list[CheckpointError] = []  # in a row
        self._background = _Background()
        self._snapshot: Snapshot | None = None

    @property
    def folder(self) -> Folder:
        return self._folder

    @property
    def folder_url(self) -> str:
        return self._folder.url

    @property
    def standing(self) -> str:
        """The newest checkpoint to go on from, in words for messages."""
        if self.saved_step is None:
            return "nothing was saved yet"
        return f"the newest checkpoint is of step {self.saved_step}"

    def url(self, step: int) -> str:
        return self._catalog.url(step)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, newest first; saves cut off do not count."""
        return self._catalog.steps()

    def check_folder(self) -> None:
        """Check that this folder can be written and that every rank sees the same one.

        Every rank calls it; CheckpointError on all of them otherwise.
        """
        # Of this start alone: another job may check the folder at the same time.
        probe = self._world.broadcast_object(f".probe-{secrets.token_hex(8)}")
        with self._world.agree(), _as_checkpoint_error(self._folder.url):
            if self._world.is_main:
                self._folder.write_bytes(probe, b"")
        try:
            with self._world.agree(), _as_checkpoint_error(self._folder.url):
                # A block of its own: `agree` ends with a gather, so rank 0 has written by now.
                if not self._folder.exists(probe):
                    raise CheckpointError(
                        f"rank {self._world.rank} does not see what rank 0 writes in "
                        f"{self._folder.url}; give a checkpoint.dir that all nodes share, or s3://"
                    )
        finally:
            # On every rank, since all raise what one has found.
            with self._world.agree(), _as_checkpoint_error(self._folder.url):
                if self._world.is_main:
                    self._folder.remove(probe)

    def prepare(self, state: Mapping[str, Piece]) -> None:
        """Agree on who stores what and set host memory aside, so that no save has to.

        Every rank calls it, or leaves it to the first save.
        """
        if self._snapshot is None:
            with self._world.agree():
                mine = own_share(state, self._world)
                self._snapshot = Snapshot(mine, copied=have_room(mine, self._world))

    def save(
        self,
        step: int,
        state: Mapping[str, Piece],
        meta: dict[str, Any],
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to store all ranks' pieces as the checkpoint of `step`; wait for the save before.

        Every rank calls it, always with pieces of the same places. `figures` are what the step
        was measured at, for keeping the best. Raises what `wait` raises.
        """
        self.wait()
        self.prepare(state)
        assert self._snapshot is not None
        snapshot = self._snapshot
        # After `wait`: this fills the memory of the save before anew.
        snapshot.take(state)
        self._background.start(lambda: self._try_to_store(step, snapshot, meta, figures or {}))
        # Without a copy the thread reads the state itself, which must not change meanwhile.
        if not snapshot.is_copy:
            self._background.wait()

    def before_change(self) -> None:
        """Let what is queued on a GPU from here on wait until the state of a save is copied.

        To be called before anything changes the state: the next update, an exchange of weights.
        """
        if self._snapshot is not None:
            self._snapshot.before_change()

    def wait(self) -> None:
        """Wait for the save in flight, if there is one.

        UnsavedError, on all ranks, if `max_failures` saves in a row have failed; fewer are told
        by rank 0 when they happen, and the next save may do better.
        """
        self._background.wait()
        if len(self._failures) >= self._max_failures:
            error = UnsavedError(
                f"{len(self._failures)} saves in a row failed, checkpoint.max_failures allows no "
                f"more; {self.standing}. The last failure: "
                f"{self._failures[-1]}"
            )
            # Threads agree on every save, so all ranks count the same failures.
            error.on_every_rank = True
            raise error

    def close(self) -> None:
        """Give a save in flight a while: what the run has reached is worth more than a quick end.

        For a run that has failed; raises nothing. With its other ranks gone a save fails at once.
        """
        with contextlib.suppress(Exception):
            self._background.wait(_LAST_SAVE_SECONDS)

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        """Remember what the checkpoint of `step` was measured at; for rank 0."""
        self._retention.note(step, figures)

    def rank(self, step: int, value: float, metric: str, settings: str) -> None:
        """Tag the best checkpoint by what its evaluation has found, for rank 0: see `Retention`."""
        self._retention.rank(step, value, metric, settings)

    def load_newest(
        self,
        state: Mapping[str, Piece],
        accept: Callable[[CheckpointReader], LoadPlan] = LoadPlan,
        *,
        up_to: int | None = None,
    ) -> LoadPlan | None:
        """Copy the newest complete checkpoint into `state`'s pieces; return the plan followed.

        With `up_to` it is the newest that is not after this step. Every rank calls it and gets the
        same verdict. Damaged checkpoints are named and passed over. `accept` is given a checkpoint
        before any tensor is read; it returns what to take of it, or raises if this run must not go
        on from it. None if there is no checkpoint at all; CheckpointError, with pieces half loaded,
        if there are some and none can be used.
        """
        steps: list[int] = []
        with self._world.agree():
            if self._world.is_main:
                steps = self.steps()
        # One listing for all: ranks that list by themselves may see different newest steps.
        steps = self._world.broadcast_object(steps)
        if up_to is not None:
            steps = [step for step in steps if step <= up_to]
        for step in steps:
            try:
                with self._world.agree():
                    plan = accept(self._catalog.reader(step))
                    wanted = {k: p for k, p in state.items() if kind_of(k) not in plan.fresh}
                    # Each rank verifies its own part. Damage that one of them finds sends all to
                    # the next checkpoint.
                    plan.reader.read_into(wanted)
            except DamagedCheckpointError as error:
                if self._world.is_main:
                    log.warning("checkpoint passed over: %s", error)
                continue
            self.saved_step = step
            return plan
        if steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self._folder.url} is complete; restore "
                "one from a copy, or start afresh on purpose with --checkpoint.resume=never"
            )
        return None

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which the run has given up; every rank calls it.

        CheckpointError if that fails: the next start would go on from one of them.
        """
        self.saved_step = step
        with self._world.agree(), _as_checkpoint_error(self._folder.url):
            if self._world.is_main:
                # First: a run is refused whose checkpoints end before what it told of.
                with contextlib.suppress(OSError):
                    self.on_saved(step)
                for later in self._catalog.steps():
                    if later > step:
                        self._catalog.discard(later)

    def _try_to_store(
        self, step: int, snapshot: Snapshot, meta: dict[str, Any], figures: Mapping[str, float]
    ) -> None:
        """Runs in the thread; all ranks' threads come to the same end."""
        try:
            self._store(step, snapshot, meta)
        except CheckpointError as error:
            self._failures.append(error)
            if self._world.is_main:
                log.warning("step %d is not saved, training goes on: %s", step, error)
                with contextlib.suppress(OSError):  # it may be the disk that is full
                    self._catalog.abandon(step)
            return
        self._failures.clear()
        self.saved_step = step
        if self._world.is_main:
            # Before anything is retired: the run's status names a checkpoint that is there.
            with contextlib.suppress(OSError):  # what a run tells of itself is not worth the run
                self.on_saved(step)
            self._retention.note(step, figures)
            # Old ones go only when a newer one is complete.
            self._retention.retire(step)

    def _store(self, step: int, snapshot: Snapshot, meta: dict[str, Any]) -> None:
        """Store the ranks' snapshots; where one fails, nothing carries the final name."""
        world, url = self._threads, self.url(step)
        with world.agree(), _as_checkpoint_error(url):
            if world.is_main:
                self._catalog.begin(step)
        entry: dict[str, Any] = {}
        with world.agree(), _as_checkpoint_error(url):
            # Hashed in host memory, before it is written: no second pass over the disk.
            entry = snapshot.entry(rank_file(world.rank))
            self._catalog.target(step).write_bytes(entry["file"], snapshot)
        # Also the barrier before the commit: every file is written when rank 0 goes on.
        entries = world.all_gather_object(entry)
        with world.agree(), _as_checkpoint_error(url):
            if world.is_main:
                with contextlib.suppress(OSError):
                    # Syncs the journal: a checkpoint never counts before the records of its steps
                    # are on disk.
                    self.before_commit()
                self._catalog.commit(step, entries, meta)


@contextmanager
def _as_checkpoint_error(url: str) -> Iterator[None]:
    """Turn what the disk or the object store raises into a CheckpointError naming the place."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot save {url}: {error}; make room or give another checkpoint.dir"
        ) from error


class _Background:
    """Runs a task beside the loop. What it raises is raised by the next `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, task: Callable[[], None]) -> None:
        assert self._thread is None, "wait for the task before"
        # A daemon: it must not keep a process alive whose loop has failed.
        self._thread = threading.Thread(target=self._run, args=(task,), daemon=True)
        self._thread.start()

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait for the task, if there is one, and raise what it has raised."""
        if self._thread is None:
            return
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            return
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            self._error = error
