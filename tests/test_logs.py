"""Rank 0 tells the story; the other ranks speak up when something is wrong."""

import logging
import re
import subprocess
import sys
import time
from typing import Any

import pytest
from tqdm import tqdm

from dtr_scale import logs
from dtr_scale.logs import ProgressBar, setup_logging, telling, watched, without_password
from tests.support.terminal import shown_by, terminal

log = logging.getLogger("dtr_scale.tests")


@pytest.mark.parametrize(
    ("rank", "lines"),
    [
        (0, ["step 1 of 2", "warning: disk 90% full", "error: gone"]),
        (3, ["[rank 3] warning: disk 90% full", "[rank 3] error: gone"]),
    ],
)
def test_each_rank_says_what_is_its_to_say(rank, lines, capsys):
    setup_logging(rank)
    log.debug("never")
    log.info("step %d of %d", 1, 2)
    log.warning("disk 90% full")
    log.error("gone")
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(" ")[2] for line in err.splitlines()] == lines
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in err.splitlines())


def test_setting_up_twice_says_everything_once(capsys):
    setup_logging(0)
    setup_logging(0)
    log.info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_line_goes_above_a_progress_bar(capsys):
    setup_logging(0)
    with tqdm(total=2, file=sys.stderr) as bar:
        bar.update()
        log.info("checkpoint saved")
    lines = re.split(r"[\r\n]", capsys.readouterr().err)
    (line,) = [line for line in lines if "saved" in line]
    assert re.fullmatch(r"\d\d:\d\d:\d\d checkpoint saved", line)


def test_a_reader_that_is_gone_does_not_stop_the_run():
    script = (
        "import logging, sys; from dtr_scale.logs import setup_logging; setup_logging(0)\n"
        "sys.stdin.read(); logging.getLogger('dtr_scale').info('hello'); print('went on')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    process.stderr.close()
    process.stdin.close()
    assert process.stdout.read() == b"went on\n"
    process.stdout.close()
    assert process.wait() in (0, 120)  # 120: Python could not flush stderr at its end


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///x/mlflow.db", "sqlite:///x/mlflow.db"),
        ("sqlite:////x/ml@flow.db?timeout=5", "sqlite:////x/ml@flow.db?timeout=5"),
        ("http://h:5000/a@b?x=1#y", "http://h:5000/a@b?x=1#y"),
        ("https://me:hush@h:5000/", "https://h:5000/"),
        ("postgresql+psycopg2://me:hu/s#h@@h:5432/runs", "postgresql+psycopg2://h:5432/runs"),
        (
            "postgresql://h/db?user=me&password=hush&sslmode=on",
            "postgresql://h/db?user=me&sslmode=on",
        ),
        ("postgresql://h/db?password=hush", "postgresql://h/db"),
        ("https://h/api?API_KEY=hush;auth_token=hush", "https://h/api"),
        ("https://h/api?x=1#access_token=hush", "https://h/api?x=1"),
        (
            "postgresql://h/db?passfile=/home/me/.pgpass",
            "postgresql://h/db?passfile=/home/me/.pgpass",
        ),
        ("databricks", "databricks"),
    ],
)
def test_no_password_is_shown(url, shown):
    assert without_password(url) == shown


def test_long_work_tells_a_log_every_half_a_minute_how_far_it_is(capsys, monkeypatch):
    setup_logging(0)
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(now))
    assert list(watched("abcde", "letters", 10)) == list("abcde")
    other = ProgressBar("letters", 10, shown=False)
    for _ in range(5):
        other.advance()
    told = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert told == ["letters: 2 of 10, eta 0:02:40", "letters: 4 of 10, eta 0:02:00"]


@pytest.mark.parametrize("columns", [80, None])
def test_long_work_fills_a_bar_on_a_terminal(columns):
    """None: a terminal that does not tell its size."""
    with terminal(columns) as screen:
        with ProgressBar("letters", 10) as bar:
            drawn: Any = bar._bar
            drawn.mininterval = 0  # or it would be drawn every tenth of a second
            bar.advance(3)
            bar.advance(4)
        print(file=sys.stderr)
        lines = shown_by(screen)
    assert max(map(len, lines)) <= 79
    assert [line for line in lines if re.match(r"letters  70%\|█+.* +\| 7/10 eta \d\d:\d\d$", line)]


def test_what_takes_long_is_told_and_what_does_not_is_not(capsys):
    setup_logging(0)
    with telling("waiting", seconds=0.05):
        # As while a network is loaded.
        logging.disable()
        time.sleep(0.3)
        logging.disable(logging.NOTSET)
    with telling("never", seconds=60):
        pass
    setup_logging(1)
    with telling("rank 0's to say", seconds=0.05):
        time.sleep(0.3)
    assert [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "waiting ..."
    ]
