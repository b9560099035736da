"""`dtr-scale status`: how runs stand, by their files alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from dtr_scale.checkpoint.lease import Holder
from dtr_scale.cli.main import main
from dtr_scale.errors import ConfigError
from dtr_scale.heartbeat import HEARTBEAT
from dtr_scale.jobs.status.read import read_status
from dtr_scale.jobs.status.state import RunStatus, judge
from dtr_scale.jobs.status.text import duration, status_text
from dtr_scale.tracking.attempts import begin_attempt
from dtr_scale.train.run_dir import RunDirectory
from tests.support.processes import wait_for
from tests.support.runs import BATCH, DEMO, ROOT, SINGLE, SMALL, status, steps_in, tiny, train

HERE, GONE, OTHER_HOST = True, False, None
RUNNING = {"outcome": "running"}


def held(is_alive, age=2.0):
    return Holder("a", "node1", 7, "/runs/a", age, is_alive)


@pytest.mark.parametrize(
    ("told", "holder", "state", "reason"),
    [
        ({"outcome": "failed", "reason": "rank 1 is gone"}, None, "failed", "rank 1 is gone"),
        ({"outcome": "finished"}, held(HERE), "finished", ""),
        (RUNNING, held(HERE), "running", ""),
        (RUNNING, held(OTHER_HOST, 30.0), "running", ""),
        (RUNNING, held(OTHER_HOST, 60.0), "dead", "pid 7 on node1 has last renewed its lease 60 s"),
        (RUNNING, held(HERE, 60.0), "stalled", "it is stopped, or holds the GIL"),
        (RUNNING, held(GONE), "dead", "pid 7 on node1 is gone"),
        (RUNNING, None, "dead", "ended without a word"),
        ({}, None, "unknown", "nothing tells"),
    ],
)
def test_a_run_lives_as_long_as_its_lease_is_renewed_or_its_process_seen(
    told, holder, state, reason
):
    found = judge(told, holder, has_logged=True)
    assert found[0] == state and reason in found[1]


def test_before_its_first_record_a_job_starts():
    assert judge(RUNNING, held(HERE), has_logged=False)[0] == "starting"


def age_lease(run_dir, seconds):
    """Make a lease look as if it was not renewed; its process is stopped meanwhile."""
    lock = run_dir / "lock"
    told = json.loads(lock.read_text())
    then = datetime.now(UTC) - timedelta(seconds=seconds)
    lock.write_text(json.dumps(told | {"time": then.isoformat(timespec="seconds")}))


def test_a_run_is_running_then_stalled_then_dead_and_goes_on(digits, tmp_path, popen, capsys):
    run_dir = tmp_path / "run"
    places = ("--config", str(DEMO), f"--data.shards={digits}", f"--run_dir={run_dir}")
    changes = (*SMALL, *SINGLE, *BATCH, "--train.max_steps=1000000", "--checkpoint.every_steps=20")
    job = popen([sys.executable, "launch/train.py", *places, *changes], cwd=ROOT)
    wait_for(lambda: steps_in(run_dir) > 25, job)
    wait_for(lambda: status(run_dir)["saved_step"], job)
    (run,) = read_status([str(run_dir)])
    assert (run.state, run.max_steps) == ("running", 1000000)
    # On a busy machine it may wait for data indeed.
    assert not [problem for problem in run.problems if "waits for data" not in problem]
    assert run.holder and run.holder.pid == job.pid and run.holder.is_alive
    assert run.step > 25 and run.record["step"] == run.step
    assert run.saved and run.saved.step % 20 == 0 and run.saved.age_seconds is not None
    # The pace is that of the steps, not of the start.
    pace = sum(32 / json.loads(line)["samples_per_second"] for line in journal_lines(run_dir)[:25])
    assert run.eta_seconds == pytest.approx(1e6 * pace / 25, rel=0.9)
    assert run.wall and 0 < run.wall.goodput < 1
    assert "running" in status_text([run]) and "goes on" in status_text([run])

    os.kill(job.pid, signal.SIGSTOP)
    age_lease(run_dir, 60)
    (run,) = read_status([str(run_dir)])
    assert run.state == "stalled" and f"pid {job.pid} on" in run.reason

    job.kill()
    job.wait()
    (run,) = read_status([str(run_dir)])
    assert run.state == "dead" and f"pid {job.pid} on" in run.reason and run.eta_seconds is None
    (attempt,) = run.attempts
    assert (attempt.outcome, attempt.end_step) == ("killed", run.step)
    assert run.saved
    seconds = [32 / json.loads(line)["samples_per_second"] for line in journal_lines(run_dir)]
    assert run.wall and run.wall.counted == pytest.approx(sum(seconds[: run.saved.step]), rel=0.01)
    assert run.wall.lost == pytest.approx(sum(seconds[run.saved.step :]), rel=0.01)

    further = run.saved.step + 2
    assert train(digits, run_dir, *BATCH, f"--train.max_steps={further}") == 0
    assert main(["status", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "killed: it ended without a word" in shown and "finished" in shown
    assert f"{further} of {further}" in shown and "100.0%" in shown


def test_what_is_odd_about_a_run_that_goes_on_is_told(tmp_path, monkeypatch):
    """This process holds the directory, as a job does; its heartbeat has stopped."""
    run_dir = RunDirectory(tmp_path / "run")
    with closing(run_dir):
        checkpoint = {"every_steps": 10}
        run_dir.write_config({"name": "a", "train": {"max_steps": 100}, "checkpoint": checkpoint})
        begin_attempt(run_dir.path, step=0, job=run_dir.job)
        assert [run.state for run in read_status([str(run_dir.path)])] == ["starting"]
        record = {"step": 25, "samples_seen": 25, "samples_per_second": 5.0, "loss": float("nan")}
        record |= {"data_wait_fraction": 0.4, "slowest_rank": 3}
        record |= {"slowest_rank_seconds": 0.9, "median_rank_seconds": 0.5}
        lines = [record | {"step": 20, "samples_seen": 20}, {}, record]
        run_dir.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
        long_ago = time.time() - 600
        os.utime(run_dir.journal, (long_ago, long_ago))
        (tmp_path / "heartbeat").touch()
        os.utime(tmp_path / "heartbeat", (long_ago, long_ago))
        monkeypatch.setenv(HEARTBEAT, str(tmp_path / "heartbeat"))
        (run_dir.path / "stacks").mkdir()
        (run_dir.path / "stacks" / "rank_0.txt").write_text("a stack")
        (run_dir.path / "stacks" / "rank_1.txt").touch()
        (run,) = read_status([str(run_dir.path)])
    assert run.state == "running" and run.eta_seconds == pytest.approx(75 / 5)
    told = "; ".join(run.problems)
    for expected in (
        "no record for 600 s, where one comes every 0 s", "25 steps without a checkpoint",
        "rank 3 is slow: 0.9 s a step", "waits for data 40% of the time",
        "the loss is nan", "unhealthy", "at a hang or a failure: 1 in",
    ):  # fmt: skip
        assert expected in told
    assert "the slowest is 3 with 0.9 s" in status_text([run])
    assert read_status([str(run_dir.path)])[0].state == "dead", "it has let go without a word"


def test_a_job_that_has_just_taken_a_run_starts_and_the_attempt_before_is_over(runs, tmp_path):
    """It has not yet loaded its checkpoint, nor told how the attempt before has ended."""
    place = shutil.copytree(runs / "good", tmp_path / "run")
    attempts = (place / "attempts.jsonl").read_text().splitlines(keepends=True)
    (place / "attempts.jsonl").write_text(attempts[0])
    with closing(RunDirectory(place)):
        (run,) = read_status([str(place)])
    assert (run.state, run.step) == ("starting", 4)
    assert [(a.outcome, a.end_step) for a in run.attempts] == [("killed", 4)]
    assert run.wall and run.wall.between == 0


def test_a_failure_whose_attempt_could_not_tell_its_end_is_told_as_it_was(runs):
    """A rank that was killed leaves it to another to write status.json."""
    lines = (runs / "bad" / "attempts.jsonl").read_text().splitlines(keepends=True)
    (runs / "bad" / "attempts.jsonl").write_text(lines[0])
    (run,) = read_status([str(runs / "bad")])
    (attempt,) = run.attempts
    assert (attempt.outcome, attempt.reason) == ("failed", "rank 3 ran out of memory")


def journal_lines(run_dir):
    """The journal's whole lines."""
    return [
        line for line in (run_dir / "journal.jsonl").read_text().splitlines() if line[-1] == "}"
    ]


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """A folder of two runs, one of which has failed."""
    folder = tmp_path_factory.mktemp("runs")
    assert tiny(digits, folder / "good", "--name=good") == 0
    shutil.copytree(folder / "good", folder / "bad")
    config = json.loads((folder / "bad" / "config.json").read_text())
    (folder / "bad" / "config.json").write_text(json.dumps(config | {"name": "bad\x1b[2J"}))
    told = status(folder / "bad") | {"outcome": "failed", "reason": "rank 3 ran out of memory"}
    (folder / "bad" / "status.json").write_text(json.dumps(told))
    (folder / "other").mkdir()
    return folder


def test_a_folder_of_runs_is_a_table(runs):
    table = status_text(read_status([str(runs)]))
    head, bad, good, *rest = table.splitlines()
    assert head.split()[:3] == ["run", "state", "step"]
    assert bad.split()[1:3] == ["failed", "4"] and good.split()[:3] == ["good", "finished", "4"]
    assert "ran out of memory" in rest[0]
    assert "\x1b" not in table, "a name of a file steers the terminal"


def test_json_is_an_object_a_run_and_a_fresh_process_loads_no_torch(runs):
    check = (
        "import sys\nfrom dtr_scale.cli.main import main\n"
        f"code = main(['status', '--json', {str(runs)!r}])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    bad, good = [json.loads(line) for line in done.stdout.splitlines()]
    assert (bad["state"], good["state"]) == ("failed", "finished")
    assert good["checkpoint"]["step"] == good["step"] == good["attempts"][0]["to_step"] == 4
    wall = good["wall_time"]
    parts = sum(wall[part] for part in ("counted", "lost", "between", "other"))
    assert parts == pytest.approx(wall["total"])
    assert good["goodput"] == pytest.approx(status(runs / "good")["goodput"], abs=0.1)


def test_the_checkpoints_alone_tell_a_part(runs):
    (run,) = read_status([str(runs / "good" / "checkpoints")])
    assert (run.name, run.step, run.max_steps, run.state) == ("good", 4, 4, "finished")


def test_a_checkpoint_that_is_gone_and_other_worries_are_told(runs, tmp_path):
    shutil.copytree(runs / "good", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    journal = tmp_path / "run" / "journal.jsonl"
    last = json.loads(journal.read_text().splitlines()[-1])
    with journal.open("a") as file:
        file.write(json.dumps(last | {"step": 5, "skipped_steps": 2}) + "\n")
    (run,) = read_status([str(tmp_path / "run")])
    assert run.saved and run.saved.step == 2
    assert any("step 4 is gone" in problem for problem in run.problems)
    assert any("2 updates skipped" in problem for problem in run.problems)
    with journal.open("a") as file:
        file.write("no JSON\n")
    (run,) = read_status([str(tmp_path / "run")])
    assert any("journal cannot be read" in problem for problem in run.problems)


def test_what_is_no_run_is_refused(runs, capsys):
    assert main(["status", str(runs / "other")]) == 2
    assert "other is no run: it has none of status.json" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is no run"):
        read_status([str(runs / "nowhere")])
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        read_status(["a" * 5000])


def test_watch_shows_it_again_until_interrupted(runs, popen):
    command = [sys.executable, "-m", "dtr_scale", "status", str(runs / "good"), "--watch", "0.1"]
    watching = popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    assert watching.stdout
    shown = 0
    while shown < 2:
        shown += "good" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 0


def test_a_run_whose_checkpoints_are_on_s3(digits, tmp_path, s3_server):
    url = "s3://bucket/status_run"
    assert tiny(digits, tmp_path / "run", f"--checkpoint.dir={url}") == 0
    for place in (str(tmp_path / "run"), url):
        (run,) = read_status([place])
        assert (run.state, run.step, run.problems) == ("finished", 4, [])
        assert run.saved and run.saved.url == f"{url}/step_00000004"
        assert run.saved.age_seconds is not None and run.saved.age_seconds < 60


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min"), (26 * 3600, "1 d 02 h")],
)
def test_times_are_told_in_two_units(seconds, told):
    assert duration(seconds) == told


def test_a_run_that_has_told_nothing_yet_is_shown():
    assert "0" in status_text([RunStatus("a", "runs/a", "starting")])
