"""Run a function in several processes that know each other as ranks, as a launcher would."""

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.processes import free_port

TIMEOUT_SECONDS = 240


def run_on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[Any]:
    """Return what `function(*args)` returns on each rank; it must be importable by name."""
    with _started(world_size, function, args) as (answers, ranks):
        return _collect(answers, ranks, timeout_seconds)


def exit_codes(world_size: int, function: Callable[..., Any], *args: Any) -> list[int | None]:
    """Return how each rank's process ended, None for one that had to be killed."""
    with _started(world_size, function, args) as (_, ranks):
        deadline = time.monotonic() + TIMEOUT_SECONDS
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in ranks]


@contextmanager
def _started(world_size: int, function: Callable[..., Any], args: Any) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(answers, rank, world_size, port, function, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        yield answers, ranks
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _collect(answers: Any, ranks: list[Any], timeout_seconds: float) -> list[Any]:
    """Wait for every rank's answer; an answer that is a traceback, or none, fails the test."""
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(found) < len(ranks):
        silent = [rank for rank in range(len(ranks)) if rank not in found]
        assert time.monotonic() < deadline, f"ranks {silent} of {len(ranks)} did not answer"
        dead = [rank for rank in silent if not ranks[rank].is_alive()]
        try:
            rank, failed, answer = answers.get(timeout=1.0)
        except queue.Empty:
            assert not dead, f"ranks {dead} of {len(ranks)} ended without an answer"
            continue
        assert not failed, f"rank {rank} of {len(ranks)}:\n{answer}"
        found[rank] = answer
    return [found[rank] for rank in range(len(ranks))]


def _rank(
    answers: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    try:
        answers.put((rank, False, function(*args)))
    except BaseException:
        answers.put((rank, True, traceback.format_exc()))
