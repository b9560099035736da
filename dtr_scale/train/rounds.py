"""Let all ranks work in rounds, and stop all of them at the same place when one fails or leaves."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from dtr_scale.engines.world import World

_Result = TypeVar("_Result")

_BUSY_SECONDS = 1.0


class CutOffError(Exception):
    """Some rank asks to leave; raised on all ranks at the same place."""


class FailedError(Exception):
    """Some rank has failed, as the message tells; raised on all ranks at the same place."""


class Rounds:
    """Rounds of work that all ranks begin and end together.

    Sharded weights are gathered by all ranks, so each must do as many forwards as the others.
    """

    def __init__(self, world: World, leave_reason: Callable[[], str | None]) -> None:
        self.world = world
        self._leave_reason = leave_reason

    @contextmanager
    def joint(self) -> Iterator[None]:
        """Enclose a round, before which all may leave: CutOffError if some rank asks to.

        What a rank raises in it is raised on all as a FailedError, at its end or in `steps`.
        """
        self._meet()
        failure: str | None = None
        try:
            yield
        except (CutOffError, FailedError):
            raise
        except Exception as error:
            # The others meet it at their next sampling step, or here after their last.
            failure = message(error)
        # Without a failure, too: it answers a rank that failed in its last step. Nobody leaves
        # here: what the round has found would be lost.
        self._meet(failure, may_leave=False)

    def steps(self, steps: Iterable[int]) -> Iterator[int]:
        """Go through the sampling steps of a round, the same on all ranks."""
        # Not between batches alone: one may take longer than a scheduler's patience.
        for step in steps:
            self._meet()
            yield step

    def on_main(self, work: Callable[[], _Result]) -> _Result | None:
        """Return what `work` returns on rank 0, None on the others.

        They meet rank 0 each second, so no collective times out however long it takes, and a
        request to leave is heard.
        """
        results: list[_Result] = []
        failures: list[str] = []

        def run() -> None:
            try:
                results.append(work())
            except Exception as error:
                failures.append(message(error))

        # A daemon: work that hangs must not keep a process alive that is to leave.
        thread = threading.Thread(target=run, daemon=True)
        if self.world.is_main:
            thread.start()
        busy = True
        while busy:
            if self.world.is_main:
                thread.join(_BUSY_SECONDS)
            busy = self._meet(next(iter(failures), None), busy=thread.is_alive())
        # Asked again: it may have failed between the last answer and its end.
        self._meet(next(iter(failures), None), may_leave=False)
        return results[0] if results else None

    def leave_reason(self) -> str:
        """Return why some rank asks to leave, the same on all; after a CutOffError."""
        return next(filter(None, self.world.all_gather_object(self._leave_reason())))

    def gathered(self, value: Any) -> list[Any]:  # noqa: ANN401
        """Return every rank's `value` on rank 0, nothing on the others."""
        return self.world.gather_to_main(value)

    def _meet(
        self, failure: str | None = None, *, may_leave: bool = True, busy: bool = False
    ) -> bool:
        """Raise on all ranks if one has failed or asks to leave; return whether one is busy."""
        told = [failure is not None, self._leave_reason() is not None, busy]
        # The host waits here at every sampling step; only so can all ranks stop at the same one.
        sums = self.world.all_reduce_sum(torch.tensor(told).float().to(self.world.device))
        failed, leaving, is_busy = sums.tolist()
        if failed:
            failures = self.world.all_gather_object(failure)
            raise FailedError(next(filter(None, failures)))
        if leaving and may_leave:
            raise CutOffError
        return bool(is_busy)


def message(error: Exception) -> str:
    """Return an error as a line of the log."""
    return f"{type(error).__name__}: {error}"
