"""Attempts of a run, as its directory keeps them."""

from datetime import UTC, datetime, timedelta

from dtr_scale.tracking.attempts import (
    ATTEMPTS,
    begin_attempt,
    close_open_attempt,
    counts,
    end_attempt,
    read_attempts,
)


def test_an_attempt_is_read_as_it_was_written(tmp_path):
    assert read_attempts(tmp_path) == []
    first = begin_attempt(tmp_path, step=0, hosts=["a", "b"], commit="c0ffee")
    end_attempt(tmp_path, first, outcome="preempted", step=7, reason="SIGTERM")
    with (tmp_path / ATTEMPTS).open("a") as file:
        file.write('{"attempt": "cut')  # by a kill
    begin_attempt(tmp_path, step=5, hosts=["b"])
    one, two = read_attempts(tmp_path)
    assert (one.step, one.end_step, one.outcome, one.reason) == (0, 7, "preempted", "SIGTERM")
    assert one.facts == {"hosts": ["a", "b"], "commit": "c0ffee"}
    assert one.end and one.start <= one.end <= two.start
    assert (two.step, two.end, two.facts) == (5, None, {"hosts": ["b"]})


def test_an_attempt_that_could_not_tell_its_end_is_closed_by_the_next(tmp_path):
    close_open_attempt(tmp_path, {}, 0.0)  # there was none
    assert read_attempts(tmp_path) == []
    begin_attempt(tmp_path, step=0)
    sign = datetime(2026, 1, 1, tzinfo=UTC)
    close_open_attempt(tmp_path, {"outcome": "running", "step": 3}, sign.timestamp())
    begin_attempt(tmp_path, step=3)
    told = {"outcome": "failed", "reason": "rank 1 is gone", "time": "2026-01-02T00:00:00+00:00"}
    close_open_attempt(tmp_path, told, sign.timestamp())
    close_open_attempt(tmp_path, told, sign.timestamp())  # it is closed
    killed, failed = read_attempts(tmp_path)
    assert (killed.outcome, killed.end, killed.end_step) == ("killed", sign, 3)
    assert (failed.outcome, failed.reason) == ("failed", "rank 1 is gone")
    assert failed.end == sign + timedelta(days=1)


def test_what_was_found_on_an_abandoned_branch_does_not_count(tmp_path):
    before = datetime.now(UTC) - timedelta(hours=1)
    begin_attempt(tmp_path, step=20)
    after = datetime.now(UTC) + timedelta(hours=1)
    attempts = read_attempts(tmp_path)
    assert counts(20, before, attempts)  # of the checkpoint that it went on from
    assert not counts(21, before, attempts)
    assert counts(21, after, attempts)
    assert counts(21, before, [])
