"""Processes that a test starts, and waits for; whatever is left of them is killed at its end."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE_SECONDS = 120.0


def wait_for(
    condition: Callable[[], object],
    *processes: "subprocess.Popen[str]",
    seconds: float = PATIENCE_SECONDS,
) -> None:
    """Return when a condition holds; AssertionError if a process has ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def started_processes() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Yield a `Popen` for text; at the end, kill its processes with all that they have started."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], **options: Any) -> "subprocess.Popen[str]":
        # A session of its own, since killing a launcher leaves its ranks.
        process = subprocess.Popen(command, text=True, start_new_session=True, **options)
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with process:
                pass  # closes its pipes and waits


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on at an address of this machine."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
