"""Ranks that end in all ways, under the supervisor of one node: real processes, no training."""

import json
import signal
import sys
import time

import pytest

from dtr_scale.jobs.supervise import agent, loop
from dtr_scale.jobs.supervise.loop import supervise
from dtr_scale.jobs.supervise.meeting import Host
from dtr_scale.train.run_dir import write_status

# Notes its variables, and does what its argument says for this attempt and this rank.
RANK = """
import json, os, signal, sys, time
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
with open(sys.argv[1], "a") as file:
    names = "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"
    file.write(json.dumps([attempt, *(os.environ[name] for name in names)]) + chr(10))
exec(json.loads(sys.argv[2])[attempt][rank])
"""
FINE, FAILED, KILLED = "sys.exit(0)", "sys.exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"
STOPPED = "os.kill(os.getpid(), signal.SIGSTOP)"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Supervise ranks that do as told; return the exit code and what they have noted, sorted."""
    monkeypatch.setattr(loop, "_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(agent, "_END_SECONDS", 0.5)

    def run(*attempts, restarts=3):
        notes = tmp_path / "notes"
        command = (sys.executable, "-c", RANK, str(notes), json.dumps(attempts))
        code = supervise(
            (), tmp_path, Host(), nproc=len(attempts[0]), restarts=restarts, command=command
        )
        return code, sorted(json.loads(line) for line in notes.read_text().splitlines())

    return run


def test_ranks_are_told_their_place(run):
    code, notes = run([FINE, FINE])
    assert code == 0
    launch = notes[0][-1]
    assert notes == [[0, str(rank), "2", "2", "127.0.0.1", launch] for rank in (0, 1)]


@pytest.mark.parametrize(
    ("failure", "told"), [(FAILED, "ended with 1"), (KILLED, "was killed by SIGKILL")]
)
def test_all_ranks_are_started_again_after_a_failure(run, failure, told, warnings_of):
    code, notes = run([FINE, failure], [FINE, FINE])
    assert code == 0
    assert [(note[0], note[1]) for note in notes] == [(0, "0"), (0, "1"), (1, "0"), (1, "1")]
    assert len({note[-1] for note in notes}) == 1, "one launch"
    (warning,) = warnings_of("dtr_scale.jobs.supervise.loop")
    assert warning.startswith(f"rank 1 {told}; all ranks are started again in 0 s, from the start ")


def test_restarts_have_a_limit(run):
    code, notes = run([FAILED], [FAILED], [FAILED], [FINE], restarts=2)
    assert code == 1
    assert [note[0] for note in notes] == [0, 1, 2]


@pytest.mark.parametrize("code", [75, 2, 130])
def test_who_left_or_would_fail_again_is_not_started_again(run, code):
    ended, notes = run([f"sys.exit({code})", f"sys.exit({code})"], [FINE, FINE])
    assert ended == code
    assert len(notes) == 2


@pytest.mark.parametrize(
    "hung", [STOPPED, "signal.signal(15, lambda *_: 0)\nwhile True: time.sleep(9)"]
)
def test_a_rank_that_does_not_end_with_the_others_is_killed(run, hung):
    started = time.monotonic()
    code, notes = run([FAILED, hung], [FINE, FINE])
    assert (code, len(notes)) == (0, 4)
    assert time.monotonic() - started < 20


def test_others_have_time_to_end_by_themselves(run, tmp_path):
    """Without a signal: SIGTERM is a request to checkpoint, for which there is no time."""
    ends_late = f"time.sleep(0.3); open({str(tmp_path / 'ended')!r}, 'w'); sys.exit(1)"
    assert run([FAILED, ends_late], [FINE, FINE])[0] == 0
    assert (tmp_path / "ended").exists()


def test_waits_double_until_there_is_a_new_checkpoint(tmp_path):
    backoff = loop._Backoff(tmp_path)
    assert backoff.position == "the start"
    assert [backoff.next_seconds() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    write_status(tmp_path, "failed", step=12, saved_step=10)
    assert [backoff.next_seconds() for _ in range(2)] == [1, 2]
    assert backoff.position == "step 10"


def test_a_signal_is_told_by_its_name():
    assert (
        loop._told({0: 1, 3: -signal.SIGSEGV})
        == "rank 3 was killed by SIGSEGV, rank 0 ended with 1"
    )
