"""Run a function in several processes that know each other as ranks, as a launcher would.

`run_on_ranks` forks them from one process that has imported torch and DeepSpeed, which would take
each of them 4 s of a core.
"""

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from typing import Any

import torch

from tests.support.processes import free_port

TIMEOUT_SECONDS = 240
_SPAWNED: Any = multiprocessing.get_context("spawn")
_FORKED: Any = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["dtr_scale.jobs.train", "dtr_scale.engines.zero"])


def run_on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[Any]:
    """Return what `function(*args)` returns on each rank; it must be importable by name."""
    context = _forked()
    answers = context.Queue()
    with _ended(_start(context, world_size, _answer, (answers, function, args))) as ranks:
        return _collect(answers, ranks, timeout_seconds)


def exit_codes(world_size: int, function: Callable[..., Any], *args: Any) -> list[int | None]:
    """Return how each rank's process ended, None for one that had to be killed."""
    # What is forked does nothing of what Python does at its exit.
    with _ended(_start(_SPAWNED, world_size, function, args)) as ranks:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in ranks]


def start_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Start `function(*args)` on each rank and return the processes, which the caller ends."""
    return _start(_forked(), world_size, function, args)


def _forked() -> Any:
    # What is forked cannot use a GPU that was looked at before.
    return _SPAWNED if torch.cuda.is_available() else _FORKED


def _start(context: Any, world_size: int, function: Callable[..., Any], args: Any) -> list[Any]:
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    places = [_Place(environment, rank) for rank in range(world_size)]
    ranks = [context.Process(target=_run, args=(place, function, args)) for place in places]
    for process in ranks:
        process.start()
    return ranks


@contextmanager
def _ended(ranks: list[Any]) -> Iterator[list[Any]]:
    try:
        yield ranks
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


class _Place:
    """This process's outputs and a rank's variables, taken over where it is unpickled.

    What is forked has those of the process that it is forked from.
    """

    def __init__(self, environment: dict[str, str], rank: int) -> None:
        self._environment = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}

    def __reduce__(self) -> Any:
        return _take_place, (self._environment, DupFd(1), DupFd(2))


def _take_place(environment: dict[str, str], *outputs: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.detach(), number)


def _run(place: None, function: Callable[..., Any], args: Any) -> None:
    function(*args)


def _answer(answers: Any, function: Callable[..., Any], args: Any) -> None:
    rank = int(os.environ["RANK"])
    try:
        answers.put((rank, False, function(*args)))
    except BaseException:
        answers.put((rank, True, traceback.format_exc()))
