"""Goodput: the share of a run's wall time that was spent on steps that count."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr_scale.tracking.attempts import Attempt, begin_attempt
from dtr_scale.tracking.goodput import Ending, closed, read_goodput, wall_times, whole_run

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
BATCH = 32
NAN, INF = float("nan"), float("inf")


def seconds(count):
    return timedelta(seconds=count)


class Simulation:
    """A run that is killed and goes on from its newest checkpoint, and its true account."""

    def __init__(self, save_every, log_every):
        self.attempts, self.journal, self.made_by = [], [], {}
        self._now, self._save_every, self._log_every = 0.0, save_every, log_every
        self.saved_step = 0

    def attempt(self, *, gap, start, num_steps, step_seconds, evaluation, outcome="killed"):
        self._now += gap
        launched, first = self._now, self.saved_step
        self._now += start
        self.journal = [record for record in self.journal if record["step"] <= first]
        logged_at = first
        for step in range(first + 1, first + num_steps + 1):
            self._now += step_seconds
            self.made_by[step] = len(self.attempts), step_seconds
            if step % self._log_every == 0:
                speed = BATCH / step_seconds
                record = {"step": step, "samples_seen": BATCH * step, "samples_per_second": speed}
                self.journal.append(record)
                logged_at = step
            if step % self._save_every == 0:
                self._now += evaluation
                self.saved_step = step
        end_step = first + num_steps
        if outcome != "killed":
            self.saved_step = end_step
        self.attempts.append(
            Attempt(
                id=str(len(self.attempts)),
                start=BEGIN + seconds(launched + start),
                step=first,
                facts={},
                launched=BEGIN + seconds(launched),
                end=BEGIN + seconds(self._now),
                outcome=outcome,
                # A kill tells of its last record, and of its last checkpoint.
                end_step=max(logged_at, self.saved_step) if outcome == "killed" else end_step,
            )
        )

    def counted(self, number):
        """Seconds of the steps of an attempt that no later one has made again, nor has to."""
        return sum(
            took
            for step, (by, took) in self.made_by.items()
            if by == number and step <= self.saved_step
        )


ATTEMPTS = st.lists(
    st.fixed_dictionaries(
        {
            "gap": st.integers(0, 100),
            "start": st.integers(0, 60),
            "num_steps": st.integers(0, 30),
            "step_seconds": st.sampled_from([0.25, 1.0, 3.0]),
            "evaluation": st.integers(0, 20),
            "outcome": st.sampled_from(["killed", "preempted"]),
        }
    ),
    min_size=1,
    max_size=6,
)


@given(jobs=ATTEMPTS, save_every=st.integers(1, 12))
def test_each_second_is_counted_once_and_each_step_once(jobs, save_every):
    run = Simulation(save_every, log_every=1)
    for job in jobs:
        run.attempt(**job)
    times = wall_times(run.attempts, run.journal, run.saved_step)
    for number, (time, attempt) in enumerate(zip(times, run.attempts, strict=True)):
        assert time.total == pytest.approx((attempt.end - attempt.begin).total_seconds())
        assert time.counted == pytest.approx(run.counted(number))
        assert time.lost >= 0 and time.other >= -1e-6 and 0 <= time.goodput <= 1
    whole = whole_run(run.attempts, times)
    first, last = run.attempts[0], run.attempts[-1]
    assert whole.total == pytest.approx((last.end - first.begin).total_seconds())
    assert whole.between == pytest.approx(sum(job["gap"] for job in jobs[1:]))
    assert whole.counted + whole.lost + whole.between + whole.other == pytest.approx(whole.total)


@given(jobs=ATTEMPTS, save_every=st.integers(1, 12), log_every=st.integers(1, 10))
def test_steps_that_no_record_tells_of_are_taken_to_be_like_their_neighbours(
    jobs, save_every, log_every
):
    run = Simulation(save_every, log_every)
    for job in jobs:
        run.attempt(**job | {"step_seconds": 2.0})
    times = wall_times(run.attempts, run.journal, run.saved_step)
    for number, time in enumerate(times):
        expected = run.counted(number) if run.journal else 0.0
        assert time.counted == pytest.approx(expected)


def test_two_attempts_by_hand():
    """100 s: 10 of start, 80 steps of 1 s, the last save after 50; killed; then all goes well."""
    run = Simulation(50, log_every=1)
    run.attempt(gap=0, start=10, num_steps=80, step_seconds=1.0, evaluation=10)
    first = wall_times(run.attempts, run.journal, run.saved_step)[0]
    assert (first.total, first.counted, first.lost, first.other) == (100, 50, 30, 20)
    job = {"gap": 40, "start": 10, "num_steps": 50, "step_seconds": 1.0, "evaluation": 0}
    run.attempt(**job, outcome="finished")
    times = wall_times(run.attempts, run.journal)
    assert [round(time.goodput, 3) for time in times] == [0.5, 0.833]
    whole = whole_run(run.attempts, times)
    assert (whole.total, whole.counted, whole.lost, whole.between) == (200, 100, 30, 40)


def test_a_run_that_goes_on_counts_all_its_steps_and_a_failed_one_those_it_has_saved():
    run = Simulation(50, log_every=1)
    run.attempt(gap=0, start=0, num_steps=60, step_seconds=1.0, evaluation=40)
    going = [replace(run.attempts[0], end=None, outcome="", end_step=None)]
    for outcome, goodput in (("running", 0.6), ("rolled back", 0.5), ("failed", 0.5)):
        ending = Ending(BEGIN + seconds(100), outcome, 60)
        (time,) = wall_times(closed(going, ending), run.journal, saved_step=50)
        assert time.goodput == pytest.approx(goodput)
    (time,) = wall_times(closed(going, ending), run.journal, saved_step=None)
    assert time.goodput == 0, "nothing was saved: all is to be made again"


@pytest.mark.parametrize("line", ["no JSON", "[1]", "{}", '{"step": "x"}'])
def test_of_a_damaged_journal_nothing_is_told(tmp_path, line):
    begin_attempt(tmp_path, step=0)
    (tmp_path / "journal.jsonl").write_text(f"{line}\n")
    ending = Ending(datetime.now(UTC), "failed", 3)
    found = read_goodput(tmp_path, tmp_path / "journal.jsonl", ending, None)
    assert found in (None, (0.0, 0.0))


def test_the_journal_of_a_run_from_another_host_begins_in_the_middle():
    attempt = Attempt("a", BEGIN, 1000, {}, end=BEGIN + seconds(400), end_step=1100)
    record = {"step": 1100, "samples_seen": 1100 * BATCH, "samples_per_second": BATCH / 2}
    (time,) = wall_times([attempt], [record])
    assert time.counted == pytest.approx(200)


@pytest.mark.parametrize("told", [{}, *({"samples_per_second": x} for x in (0.0, NAN, INF))])
def test_a_record_that_tells_no_speed_is_passed_over(told):
    attempt = Attempt("a", BEGIN, 0, {}, end=BEGIN + seconds(400), end_step=20)
    good = {"step": 20.0, "samples_seen": 640.0, "samples_per_second": 3.2}
    odd = {"step": 10.0, "samples_seen": 320.0, **told}
    (time,) = wall_times([attempt], [odd, good])
    assert time.counted == pytest.approx(200)
