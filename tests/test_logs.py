"""Rank 0 tells the story; the other ranks speak up when something is wrong."""

import logging
import re
import subprocess
import sys

import pytest
from tqdm import tqdm

from dtr_scale.logs import setup_logging, without_password

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
