"""Start a training's ranks again after a failure, on all nodes together."""

import logging
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dtr_scale.jobs.supervise.agent import RANK_COMMAND, quiet_agent, run_attempt
from dtr_scale.jobs.supervise.meeting import Attempt
from dtr_scale.jobs.supervise.signals import START_AGAIN
from dtr_scale.train.run_dir import STATUS, find_object

log = logging.getLogger(__name__)

FINISHED, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
_FIRST_SECONDS, _MAX_SECONDS = 1.0, 60.0


class Meeting(Protocol):
    """What says when the next attempt begins."""

    def begin(self) -> Attempt: ...

    def is_over(self) -> bool: ...

    def end(self, *, finished: bool) -> None: ...


def supervise(
    training: Sequence[str],
    run_path: Path,
    meeting: Meeting,
    *,
    nproc: int,
    nnodes: int = 1,
    node_rank: int = 0,
    restarts: int,
    command: Sequence[str] = RANK_COMMAND,
) -> int:
    """Run this node's ranks to the end of the training; return the exit code for all of it.

    0: finished; 75: asked to leave; 130: twice, by Ctrl-C; 2: a mistake, which would be one again;
    1: a failure after the last of `restarts`. Each attempt goes on from the newest complete
    checkpoint.
    """
    quiet_agent()
    backoff = _Backoff(run_path)
    while True:
        attempt = meeting.begin()
        try:
            codes = run_attempt(
                attempt,
                training,
                nproc=nproc,
                nnodes=nnodes,
                node_rank=node_rank,
                command=command,
                is_over=meeting.is_over,
            )
            meeting.end(finished=not codes)
        except (RuntimeError, OSError) as error:
            # A node was lost after the meeting; the next one waits until it is back.
            meeting.end(finished=False)
            told = f"the nodes did not find each other: {str(error).partition(chr(10))[0]}"
        else:
            for code in (START_AGAIN, MISTAKE, INTERRUPTED):  # all ranks end with it together
                if code in codes.values():
                    return code
            if not codes:
                return FINISHED
            told = _told(codes)
        if attempt.number >= restarts:
            log.error("%s; restart %d of %d was the last", told, attempt.number, restarts)
            return FAILED
        seconds = backoff.next_seconds()
        log.warning(
            "%s; all ranks are started again in %.0f s, from %s (restart %d of %d)",
            told, seconds, backoff.position, attempt.number + 1, restarts,
        )  # fmt: skip
        time.sleep(seconds)


class _Backoff:
    """Waits twice as long after each failure, as long as no new checkpoint is made."""

    def __init__(self, run_path: Path) -> None:
        self._run_path = run_path
        self._saved_step = self._read()
        self._seconds = _FIRST_SECONDS

    @property
    def position(self) -> str:
        """Where the next attempt goes on from."""
        return "the start" if self._saved_step is None else f"step {self._saved_step}"

    def next_seconds(self) -> float:
        saved_step = self._read()
        if saved_step != self._saved_step:
            self._saved_step, self._seconds = saved_step, _FIRST_SECONDS
        seconds = self._seconds
        self._seconds = min(2 * seconds, _MAX_SECONDS)
        return seconds

    def _read(self) -> int | None:
        return find_object(self._run_path / STATUS).get("saved_step")


def _told(codes: Mapping[int, int]) -> str:
    # Killed ones first: the others ended because of them.
    return ", ".join(_ending(rank, codes[rank]) for rank in sorted(codes, key=codes.__getitem__))


def _ending(rank: int, code: int) -> str:
    if code < 0:
        return f"rank {rank} was killed by {signal.Signals(-code).name}"
    return f"rank {rank} ended with {code}"
