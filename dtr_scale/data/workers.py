"""The processes that read ahead: started so that they live and die with their parent alone."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker, util

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
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _LEAVE_SIGNALS)  # its start unblocks some
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_child_exit)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_only(parent_pid: int, _worker_id: int) -> None:
    """End this worker when its main process sends SIGTERM or is gone; ignore what others send."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            received = signal.sigtimedwait({signal.SIGTERM}, 5.0)
            if received is not None and received.si_pid == parent_pid:
                break
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    # Last of all, and at once: what threads are fetching would fail loudly while Python shuts down.
    util.Finalize(None, os._exit, args=(0,), exitpriority=-1000)
