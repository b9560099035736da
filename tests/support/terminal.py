"""Make stderr a terminal, and read what it shows."""

import os
import pty
import re
import termios
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress


@contextmanager
def terminal(columns: int | None) -> Iterator[int]:
    """Make stderr a terminal; yield the file descriptor of its screen, which is to be closed.

    `columns` None: it does not tell its size.
    """
    screen, device = pty.openpty()
    termios.tcsetwinsize(device, (24, columns) if columns else (0, 0))
    stderr = os.fdopen(device, "w", buffering=1)
    with redirect_stderr(stderr):
        yield screen
    with suppress(OSError):  # what could not be shown is still in its buffer
        stderr.close()


def shown_by(screen: int) -> list[str]:
    """Return all that a terminal has drawn up to the first new line, and close it."""
    shown = ""
    while "\n" not in shown:  # a bar stays on one line to its end
        shown += os.read(screen, 100_000).decode()
    os.close(screen)
    return [re.sub(r"\x1b\[A", "", line).strip() for line in re.split(r"[\r\n]+", shown)]
