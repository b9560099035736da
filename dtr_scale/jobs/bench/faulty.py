"""Run a supervisor whose ranks fail when they are told to.

    python -m dtr_scale.jobs.bench.faulty supervise ...

`bench faults` starts it. Some failures cannot be made from outside: a rank makes them of itself
when it gets a signal.
"""

import ctypes
import runpy
import signal
import sys
import time
from functools import partial

HOLD_GIL, HANG = signal.SIGRTMIN + 1, signal.SIGRTMIN + 2
MODULE = "dtr_scale.jobs.bench.faulty"
_FOR_GOOD_SECONDS = 10**6


def _let_ranks_be_faulty() -> None:
    from dtr_scale.jobs.supervise import start

    command = (sys.executable, "-u", "-m", MODULE, "train")
    start.supervise = partial(start.supervise, command=command)


def _obey() -> None:
    # PyDLL keeps the GIL during the call, which CDLL would let go.
    signal.signal(HOLD_GIL, lambda *_: ctypes.PyDLL(None).sleep(_FOR_GOOD_SECONDS))
    signal.signal(HANG, lambda *_: _hang_in_forward())


def _hang_in_forward() -> None:
    """Stand still in the next forward: waiting for data or a save is no hang."""
    from dtr_scale.engines.place import Place

    enter = Place.enter

    def enter_and_stay(self: Place, section: str) -> None:
        enter(self, section)
        if section == "forward":
            time.sleep(_FOR_GOOD_SECONDS)

    Place.enter = enter_and_stay


if __name__ == "__main__":
    if sys.argv[1] == "supervise":
        _let_ranks_be_faulty()
    else:
        _obey()
    runpy.run_module("dtr_scale", run_name="__main__", alter_sys=True)
