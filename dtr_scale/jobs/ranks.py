"""Share work over the ranks of a launcher, which leave and fail together."""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dtr_scale.engines.peers import Failure, PeerWatch, end_at_exit
from dtr_scale.engines.world import World, join_world
from dtr_scale.errors import PeerError
from dtr_scale.launchers import launched_rank
from dtr_scale.signals import LeaveRequest

log = logging.getLogger(__name__)

EXIT_AGAIN = 75
"""Of a job that was asked to leave: the same command goes on."""
_ASK_SECONDS = 1.0
_PEER_SECONDS = 5.0


class Ranks:
    """The ranks of a job, which work by themselves until they `part`."""

    def __init__(self, world: World, peers: PeerWatch, leave: LeaveRequest) -> None:
        self.world = world
        self._peers = peers
        self._leave = leave
        self._has_parted = False
        self._has_told = False
        self._asked_at = 0.0

    def leave_reason(self) -> str | None:
        """Return why this rank should leave: it was asked to, or another one was; else None.

        PeerError if another rank has failed. To be called often: what it asks the other ranks, it
        asks once a second.
        """
        if reason := self._leave.reason:
            if not self._has_told and not self._has_parted:
                self._has_told = True
                self._peers.post(reason, EXIT_AGAIN)
            return reason
        now = time.monotonic()
        if self._has_parted or now - self._asked_at < _ASK_SECONDS:
            return None
        self._asked_at = now
        failure = self._peers.failure()
        if failure and failure.exit_code != EXIT_AGAIN:
            raise _peer_error(failure)
        return failure.reason if failure else None

    def part(self, reason: str | None) -> str | None:
        """Meet the other ranks at the end of the work; return why one of them left it, or None.

        What follows is done by rank 0 alone, for which nobody waits.
        """
        try:
            # Over gloo: ranks come here minutes apart, and NCCL would hold their GPUs busy.
            reasons = self.world.in_background().all_gather_object(reason)
        except RuntimeError:
            # The others find it out too, and one of them may have told already.
            if failure := self._peers.failure():
                raise _peer_error(failure) from None
            raise PeerError(
                "another rank is gone: it was killed, or its node is lost; give the same command, "
                "which goes on with what is stored"
            ) from None
        self._has_parted = True
        self._peers.close()
        self.world.leave()
        return next(filter(None, reasons), None)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks of an error; raise PeerError if it is the loss of one of them."""
        if self._has_parted or self.world.world_size == 1:
            return
        if isinstance(error, RuntimeError) and (
            failure := self._peers.wait_for_failure(_PEER_SECONDS)
        ):
            end_at_exit(failure.exit_code)
            raise _peer_error(failure) from None
        exit_code = getattr(error, "exit_code", 1)
        self._peers.post(str(error).partition("\n")[0] or type(error).__name__, exit_code)
        # Threads of the watch may be in C++ while Python shuts down, which aborts with -6.
        end_at_exit(exit_code)


@contextmanager
def joined_ranks(leave: LeaveRequest | None = None) -> Iterator[Ranks]:
    """Join the ranks that a launcher started.

    The caller keeps `leave` listening to requests to leave; without one it is made here.
    """
    with ExitStack() as stack:
        if leave is None:
            leave = LeaveRequest()
            stack.enter_context(leave.listening())
        world = join_world(needs_process_group=False)
        ranks = Ranks(world, PeerWatch(world, end=_end), leave)
        try:
            yield ranks
        except BaseException as error:
            ranks.fail(error)
            raise


def _peer_error(failure: Failure) -> PeerError:
    told = PeerError(f"another rank failed: {failure.reason}")
    told.exit_code = failure.exit_code
    # The rank that failed tells it; but who was killed, or hangs, tells nothing.
    own = re.match(r"rank \d+: ", failure.reason)
    told.reported = bool(own) and "no sign of life" not in failure.reason
    return told


def _end(failure: Failure) -> None:
    """End this process, which still waits for a rank that has failed."""
    if launched_rank() == 0:
        log.error("another rank failed: %s", failure.reason)
    # Nothing else ends a main thread that is inside a collective.
    os._exit(failure.exit_code)
