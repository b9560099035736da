"""Start the processes that read ahead, so that they live and die with their parent alone."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker, util

from torch import Tensor

from dtr_scale.errors import DataError

_SHM = "/dev/shm"
_QUEUES_BYTES = 2**20
_LEAVE_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Start workers that requests to leave do not reach, and keep torch out of SIGCHLD.

    A launcher signals the whole process tree, the main process decides what that means: workers,
    and Python's resource tracker that comes with them, inherit the signals blocked. torch's
    SIGCHLD handler would raise a RuntimeError anywhere in the main thread when a worker dies;
    without it the next batch raises, after 5 s at most.
    """
    on_child_exit = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEAVE_SIGNALS)
    try:
        # Started here, with the signals blocked: killed by one, it loses the workers' semaphores.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _LEAVE_SIGNALS)  # its start unblocks some
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_child_exit)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shared(slots: Iterable[Tensor], fix: str) -> list[Tensor]:
    """Move tensors to memory that processes share; DataError where /dev/shm has no room for them.

    Without room Python could not start the workers either, whose queues need a little of it.
    """
    slots = list(slots)
    needed = sum(slot.nbytes for slot in slots) + _QUEUES_BYTES
    shm = os.statvfs(_SHM)
    total, free = shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize
    try:
        if needed > free:
            raise RuntimeError("too little is free")
        # torch reserves the room at once: ranks that start together do not take it twice.
        return [slot.share_memory_() for slot in slots]
    except RuntimeError as error:
        room = f"{needed / 1e6:.1f} MB of {_SHM}, {free / 1e6:.1f} of its {total / 1e6:.1f} MB are"
        raise DataError(
            f"micro-batches that are read ahead need {room} free; fix: give it more (containers: "
            f"--shm-size={needed * 2 // 2**20 + 1}m), or {fix}"
        ) from error


def obey_parent_only(parent_pid: int, _worker_id: int) -> None:
    """End this worker when its main process sends SIGTERM or is gone; ignore what others send."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            # SIGTERM is blocked since the start (see `starting_workers`), so it can be waited for,
            # and only this call tells who sent it. The 5 s are for a parent that was killed.
            received = signal.sigtimedwait({signal.SIGTERM}, 5.0)
            if received is not None and received.si_pid == parent_pid:
                break
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    # Last of all, and at once: what threads are fetching would fail loudly while Python shuts down.
    util.Finalize(None, os._exit, args=(0,), exitpriority=-1000)
