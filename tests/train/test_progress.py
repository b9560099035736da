"""Progress of a run in a log file and on a terminal."""

import logging
import os
import re
from typing import Any

import pytest

from dtr_scale.logs import setup_logging
from dtr_scale.train.progress import Pace, Progress
from tests.support.terminal import shown_by, terminal

log = logging.getLogger("dtr_scale.tests")
RECORD = {
    "loss": 19.6,  # one sample of the last timestep
    "loss_mean": 0.12347,
    "mse_mean": 0.1201,
    "vb_mean": 0.00337,
    "data_wait_fraction": 0.031,
    "memory_gb": 1.26,
}


def progress_from(step, max_steps):
    return Progress(step=step, max_steps=max_steps, batch_size=256)


def test_a_log_file_gets_a_line_of_means_per_logged_step(capsys):
    setup_logging(0)
    progress = progress_from(10, 40)
    for step in range(11, 21):
        progress.count(step, 0.26)
    progress.show(RECORD)
    for step in range(21, 41):
        progress.count(step, 0.26)
    progress.show(RECORD)
    progress.close()
    first, last = capsys.readouterr().err.splitlines()
    assert re.sub(r"^\d\d:\d\d:\d\d ", "", first) == (
        "step 20/40  loss 0.1235  mse 0.1201  vb 0.0034  984.6 samples/s  260 ms/step  "
        "data wait 3%  eta 0:00:05  mem 1.3 GB"
    )
    assert re.match(r"\d\d:\d\d:\d\d step 40/40  loss .* eta 0:00:00 ", last)


def test_the_pace_is_that_of_the_last_minute_without_the_first_step():
    pace = Pace()
    assert pace.seconds_per_step is None
    pace.add(85.0)  # it compiles
    assert pace.seconds_per_step is None
    for _ in range(10):
        pace.add(2.0)
    assert pace.seconds_per_step == 2
    for _ in range(59):
        pace.add(1.0)
    assert pace.seconds_per_step == pytest.approx(61 / 60)
    pace.add(300.0)  # a step may be longer than the minute
    assert pace.seconds_per_step == 300


@pytest.mark.parametrize("columns", [80, 120, None])
def test_a_terminals_bar_moves_at_every_step_and_fits(columns):
    """None: a terminal that does not tell its size."""
    with terminal(columns) as screen:
        progress = progress_from(399_000, 400_000)
        bar: Any = progress._bar
        for step in range(399_001, 399_004):
            bar.last_print_t = 0  # or it would wait a tenth of a second
            progress.count(step, 200.0)
        progress.show(RECORD)
        bar.last_print_t = 0
        progress.count(399_004, 200.0)
        progress.close()
        lines = shown_by(screen)
    assert max(map(len, lines)) <= (columns or 80) - 1
    for step in range(399_000, 399_005):
        assert any(f"| {step}/400000" in line for line in lines)
    assert re.search(r"^99\.8%\|.*\| 399003/400000, 1\.3 samples/s  .*eta 2d 7h$", lines[4])
    told = r"loss 0\.1235  1\.3 samples/s" + (r"  200\.00 s/step" if columns == 120 else "")
    assert re.search(rf"^99\.8%\|.{{4,}}\| 399004/400000, {told}  eta 2d 7h$", lines[-2])


def test_a_terminal_that_is_gone_does_not_stop_the_run():
    with terminal(160) as screen:
        setup_logging(0)
        progress = progress_from(0, 40)
        os.close(screen)
        log.info("leaving on request (SIGHUP)")
        progress.count(1, 0.1)
        progress.show(RECORD)
        progress.close()
