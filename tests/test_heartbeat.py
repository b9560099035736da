"""The heartbeat of a node: real trainings that beat, stop, stand still and end."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import PosixPath

import pytest

from dtr_scale.cli.main import main
from dtr_scale.heartbeat import HEARTBEAT, Heartbeat, check_heartbeat
from tests.support.processes import PATIENCE_SECONDS, wait_for
from tests.support.runs import DEMO, ROOT, SINGLE, SMALL, TINY

# Trains with a heartbeat of 0.1 s, and with an evaluation that lasts until it may go on.
EVALUATING = """
import sys, time
from pathlib import Path
from dtr_scale.heartbeat import Heartbeat
file, go_on, standstill, *overrides = sys.argv[1:]
beat = Heartbeat(Path(file), interval_seconds=0.1, standstill_seconds=float(standstill))
with beat.beating() as heartbeat:
    from dtr_scale.config.load import load_experiment
    from dtr_scale.jobs.train import train_experiment
    from dtr_scale.train.evaluate import PeriodicEvaluation
    def evaluate(self, step):
        print("evaluating", flush=True)
        while not Path(go_on).exists():
            time.sleep(0.01)
    PeriodicEvaluation.__call__ = evaluate
    sys.exit(train_experiment(load_experiment(overrides.pop(0), overrides), heartbeat))
"""


@pytest.fixture
def evaluating(digits, tmp_path, popen):
    """Enter a training that is in its evaluation, and let it end well."""

    @contextmanager
    def evaluating(standstill_seconds):
        go_on = tmp_path / "go_on"
        places = (f"--data.shards={digits}", f"--run_dir={tmp_path / 'run'}")
        experiment = (DEMO, *SMALL, *SINGLE, *TINY, *places, "--evaluation.every_steps=3")
        arguments = (tmp_path / "beat", go_on, str(standstill_seconds), *experiment)
        command = [sys.executable, "-c", EVALUATING, *arguments]
        process = popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout.readline() == "evaluating\n"
        yield process
        go_on.touch()
        assert process.wait(PATIENCE_SECONDS) == 0

    return evaluating


def is_renewed(path):
    """Tell whether a file is given a new time within a second."""
    before, deadline = path.stat().st_mtime_ns, time.monotonic() + 1
    while path.stat().st_mtime_ns == before and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.stat().st_mtime_ns != before


@pytest.mark.slow
def test_it_beats_through_an_evaluation_and_not_in_a_process_that_is_stopped(evaluating, tmp_path):
    path = tmp_path / "beat"
    with evaluating(standstill_seconds=600) as process:
        assert is_renewed(path) and is_renewed(path)
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: not check_heartbeat(path, 1)[0])
        assert not is_renewed(path)
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: check_heartbeat(path, 1)[0])
    assert not path.exists()


@pytest.mark.slow
def test_it_does_not_beat_for_a_loop_that_stands_still(evaluating, tmp_path):
    path = tmp_path / "beat"
    with evaluating(standstill_seconds=0.5):
        wait_for(lambda: not check_heartbeat(path, 1)[0])
        assert not is_renewed(path)
    assert not path.exists()


def test_before_the_first_step_the_loop_may_take_any_time(tmp_path):
    path = tmp_path / "beat"
    with Heartbeat(path, interval_seconds=0.01, standstill_seconds=0).beating() as heartbeat:
        assert is_renewed(path) and is_renewed(path)
        heartbeat.moved()
        wait_for(lambda: not is_renewed(path))


class SlowDisk(PosixPath):
    """A file that takes 0.1 s to renew."""

    def touch(self, mode=0o666, exist_ok=True):
        time.sleep(0.1)
        super().touch(mode, exist_ok)


def test_a_renewal_on_its_way_does_not_bring_the_file_back(tmp_path):
    path = SlowDisk(tmp_path / "beat")
    with Heartbeat(path, interval_seconds=0.001).beating():
        time.sleep(0.05)
    assert not path.exists()
    time.sleep(0.2)
    assert not path.exists()


def test_a_command_beats_from_its_start_to_its_end(digits, tmp_path, popen):
    path, run_dir = tmp_path / "new" / "beat", tmp_path / "run"
    places = ("--config", str(DEMO), f"--data.shards={digits}", f"--run_dir={run_dir}")
    command = [sys.executable, "launch/train.py", *places, *SMALL, *SINGLE, *TINY]
    process = popen(command, cwd=ROOT, env=os.environ | {HEARTBEAT: str(path)})
    wait_for(path.exists)
    assert not run_dir.exists()  # torch is not even imported yet
    assert process.wait(PATIENCE_SECONDS) == 0
    assert not path.exists()


# As a process that another job has thrown out: nothing that Python does at its exit is done.
THROWN_OUT = """
import sys
from pathlib import Path
from dtr_scale.heartbeat import Heartbeat
from dtr_scale.jobs.train import _end_without_a_trace
with Heartbeat(Path(sys.argv[1])).beating() as heartbeat:
    _end_without_a_trace(heartbeat, "lost")
"""


def test_it_is_removed_where_a_process_ends_at_once(tmp_path):
    path = tmp_path / "beat"
    ended = subprocess.run([sys.executable, "-c", THROWN_OUT, path], cwd=ROOT, check=False)
    assert ended.returncode == 1
    assert not path.exists()


def test_one_process_of_a_node_beats(tmp_path, monkeypatch, capsys):
    """A file that cannot be written is told by the process that would write it, and by no other."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(HEARTBEAT, str(tmp_path / "file" / "beat"))
    for local_rank, told in (("0", f"{HEARTBEAT} = "), ("1", "missing.json")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert main(["train", "--config", "missing.json"]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("age_seconds", "code", "told"),
    [(None, 0, "nothing trains here"), (290, 0, "healthy: "), (310, 1, "unhealthy: ")],
)
def test_a_probe_gets_an_exit_code(tmp_path, monkeypatch, capsys, age_seconds, code, told):
    path = tmp_path / "beat"
    if age_seconds is not None:
        path.touch()
        os.utime(path, (time.time() - age_seconds,) * 2)
    assert main(["health", str(path)]) == code
    monkeypatch.setenv(HEARTBEAT, str(path))
    assert main(["health"]) == code
    assert main(["health", "--max-minutes=10"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == out[1] and out[0].startswith(told)


def test_a_probe_without_a_file_is_refused(monkeypatch, capsys):
    monkeypatch.delenv(HEARTBEAT, raising=False)
    assert main(["health"]) == 2
    assert f"give FILE, or set {HEARTBEAT}" in capsys.readouterr().err
