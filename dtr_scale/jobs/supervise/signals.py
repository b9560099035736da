"""Hand a launcher's signals on to the ranks that it has started."""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Thread

START_AGAIN = 75
"""The exit code of who was asked to leave."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def hand_signals_on(signals: Iterable[signal.Signals] = SIGNALS) -> None:
    """From here on give each of `signals` to the ranks: the children of the main thread.

    Without ranks, as while the nodes look for each other, there is nothing to save, and the process
    ends with 75. The main thread calls this.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python's own handlers would wait with the main thread, which may be looking for other nodes.
    signal.set_wakeup_fd(writer)
    heard = {number for number in signals if signal.getsignal(number) != signal.SIG_IGN}
    for number in heard:
        signal.signal(number, lambda *_: None)
    Thread(target=_hand_on, args=(reader, heard), daemon=True).start()


def signal_ranks(number: int) -> bool:
    """Send a signal to all ranks of this process; return whether there is any."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")  # the main thread has no others
    for rank in children.read_text().split():
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(int(rank), number)
    return bool(children.read_text())


def _hand_on(reader: int, heard: set[signal.Signals]) -> None:
    while number := os.read(reader, 1)[0]:
        if number in heard and not signal_ranks(number):
            os._exit(START_AGAIN)
