"""Run one attempt of a training: this node's ranks, started and watched by torchrun's agent."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from dtr_scale.engines.stacks import SIGNAL as STACKS_SIGNAL
from dtr_scale.jobs.supervise.meeting import Attempt

RANK_COMMAND = (sys.executable, "-u", "-m", "dtr_scale", "train")
_POLL_SECONDS = 0.1
# Ranks end by themselves when one of them has failed, and tell why (`engines.peers`).
_END_SECONDS = 8.0
_STACKS_SECONDS = 1.0
# All nodes have met a moment ago.
_JOIN_SECONDS = 60


class _Agent(LocalElasticAgent):
    """Lets ranks end by themselves after a failure, and kills what is left of them.

    `is_over` tells whether another node's ranks have failed.
    """

    is_over: Callable[[], bool]

    def _monitor_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> RunResult:
        context = self._pcontext
        assert isinstance(context, SubprocessContext)
        ranks = [handler.proc for handler in context.subprocess_handlers.values()]
        # Before the agent looks: it sends SIGTERM to the others, which is a request to checkpoint.
        if any(rank.poll() for rank in ranks) or self.is_over():
            _let_end(ranks)
        return super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]


def run_attempt(
    attempt: Attempt,
    training: Sequence[str],
    *,
    nproc: int,
    nnodes: int,
    node_rank: int,
    command: Sequence[str] = RANK_COMMAND,
    is_over: Callable[[], bool] = lambda: False,
) -> dict[int, int]:
    """Run this node's ranks until all have ended; return the exit codes of those that failed.

    They have a few seconds to end once one of them has failed, or `is_over`.
    A signal's number is negative, as in `subprocess`. Raises RuntimeError if the nodes do not find
    each other.
    """
    # The agent itself handles those that are named here; all others are handed on to the ranks.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    spec = WorkerSpec(
        role="default",
        local_world_size=nproc,
        entrypoint=command[0],
        args=(*command[1:], *training),
        # Its store is one for each attempt: it keeps the addresses of ranks that are gone.
        rdzv_handler=StaticTCPRendezvous(
            attempt.host, attempt.port, node_rank, nnodes, attempt.launch, _JOIN_SECONDS
        ),
        # The agent tells the ranks of the difference: TORCHELASTIC_RESTART_COUNT.
        max_restarts=attempt.number,
        monitor_interval=_POLL_SECONDS,
    )
    agent = _Agent(spec, DefaultLogsSpecs(), exit_barrier_timeout=30)
    agent.is_over = is_over
    agent._remaining_restarts = 0  # the next attempt is a meeting of all nodes again
    # torch's own decorator hides the type.
    result = cast(RunResult, agent.run())
    return {rank: failure.exitcode for rank, failure in result.failures.items()}


def _let_end(ranks: Sequence["subprocess.Popen[str]"]) -> None:
    """Wait for ranks to end; let those that do not write their stacks, and kill them."""
    # One that is stopped does not end by itself, however long it is given.
    _wait(_END_SECONDS, lambda: all(_is_stopped(rank.pid) for rank in _running(ranks)))
    if not _running(ranks):
        return
    # A rank that is stopped answers once it is woken up: stacks first, then all that waits for it.
    for number in (STACKS_SIGNAL, signal.SIGCONT):
        for rank in _running(ranks):
            with suppress(ProcessLookupError):
                rank.send_signal(number)
    _wait(_STACKS_SECONDS, lambda: not _running(ranks))
    for rank in _running(ranks):
        rank.kill()
        rank.wait()


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        # "pid (name) state ...", where a name may be anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _running(ranks: Sequence["subprocess.Popen[str]"]) -> list["subprocess.Popen[str]"]:
    return [rank for rank in ranks if rank.poll() is None]


def _wait(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def quiet_agent() -> None:
    """Leave out what the agent logs: the supervisor tells of each attempt in one line."""
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
