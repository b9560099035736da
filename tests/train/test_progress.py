"""Progress of a run in a log file and on a terminal."""

import logging
import os
import pty
import re
import termios
from contextlib import contextmanager, redirect_stderr, suppress

from dtr_scale.logs import setup_logging
from dtr_scale.train.progress import Progress

log = logging.getLogger("dtr_scale.tests")
RECORD = {"loss": 0.12347, "samples_per_second": 987.68, "data_wait_fraction": 0.031}
FIGURES = r"loss 0\.1235  987\.7 samples/s  data wait 3%  eta \d+:\d\d:\d\d  mem \d+\.\d GB"


@contextmanager
def terminal():
    """Make stderr a terminal; yield the file descriptor of its screen, which is to be closed."""
    screen, device = pty.openpty()
    termios.tcsetwinsize(device, (24, 160))
    stderr = os.fdopen(device, "w", buffering=1)
    with redirect_stderr(stderr):
        yield screen
    with suppress(OSError):  # what could not be shown is still in its buffer
        stderr.close()


def test_a_log_file_gets_a_line_per_logged_step(capsys):
    setup_logging(0)
    progress = Progress(step=10, max_steps=40)
    progress.show(RECORD | {"step": 20})
    progress.show(RECORD | {"step": 40})
    progress.close()
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"\d\d:\d\d:\d\d step 20/40  {FIGURES}", first)
    assert re.fullmatch(rf"\d\d:\d\d:\d\d step 40/40  {FIGURES}", last)
    assert "eta 0:00:00" in last


def test_the_time_left_is_that_of_this_jobs_steps(monkeypatch):
    progress = Progress(step=1000, max_steps=1300)
    now = progress._start
    monkeypatch.setattr("time.monotonic", lambda: now + 100)
    assert str(progress._time_left(1100)) == "0:03:20"


def test_a_terminal_gets_a_bar():
    with terminal() as screen:
        progress = Progress(step=10, max_steps=40)
        progress.show(RECORD | {"step": 20})
        progress.close()
        shown = ""
        while "\n" not in shown:  # the bar stays on one line to its end
            shown += os.read(screen, 100_000).decode()
        os.close(screen)
    assert " 25%|" in shown
    assert re.search(rf"\| 20/40, {FIGURES}", shown)


def test_a_terminal_that_is_gone_does_not_stop_the_run():
    with terminal() as screen:
        setup_logging(0)
        progress = Progress(step=0, max_steps=40)
        os.close(screen)
        log.info("leaving on request (SIGHUP)")
        progress.show(RECORD | {"step": 20})
        progress.close()
