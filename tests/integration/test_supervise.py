"""A supervisor that starts those of other hosts by ssh, as users type it."""

import signal

import pytest

from dtr_scale.jobs.train import train_experiment
from tests.support.processes import wait_for
from tests.support.ranks import run_on_ranks
from tests.support.runs import DEMO, ROOT, SMALL, demo_experiment, journal, status, steps_in
from tests.support.typed import commands_of

FP32 = (*SMALL, "--engine.precision=fp32", "--checkpoint.every_steps=10")
A_RANK = "dtr_scale train"


@pytest.fixture
def supervise(hosts, digits, tmp_path):
    """Start a training with a rank on each host, from the first of them."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")

    def start(*overrides):
        return hosts[0].start(
            "dtr-scale", "supervise", "--hostfile", str(hostfile), "--restarts", "3", "--",
            "--config", str(DEMO), *FP32, f"--data.shards={digits}", f"--run_dir={tmp_path}/run",
            *overrides,
        )  # fmt: skip

    return start


def test_a_run_outlives_a_rank_and_a_host(hosts, supervise, digits, tmp_path):
    """The host boots again, and is reached again; the journal is that of a run left in peace."""
    run_dir, steps = tmp_path / "run", "--train.max_steps=400"
    supervisor = supervise(steps)
    wait_for(lambda: steps_in(run_dir) >= 15, supervisor)
    hosts[1].run("pkill", "-KILL", "-f", A_RANK)
    wait_for(lambda: steps_in(run_dir) >= 60, supervisor)
    hosts[1].cut()
    hosts[1].kill()
    wait_for(lambda: status(run_dir)["outcome"] == "failed", supervisor)
    hosts[1].boot()
    output, _ = supervisor.communicate(timeout=240)
    assert supervisor.returncode == 0, output
    assert "rank 1 on node2 is gone: it was killed, or its node is lost" in output
    assert "(restart 2 of 3)" in output
    assert "the connection to node2 is lost; it is tried again" in output
    stacks = (run_dir / "stacks/rank_00000.txt").read_text()
    assert stacks.count(" rank 0, pid ") == 2, "each time that it had to end"
    peace = demo_experiment(digits, tmp_path / "peace", *FP32, steps)
    run_on_ranks(2, train_experiment, peace)
    assert journal(run_dir) == journal(tmp_path / "peace")


def test_the_commands_of_the_readme_lose_a_rank_and_recover(hosts, tmp_path):
    """As they stand there, in a folder with the repository's configs and a hostfile."""
    commands = commands_of("launch/README.md", "To see it at work")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "hostfile").write_text((ROOT / "launch/hostfile.example").read_text())
    # A file, since what `pkill -f` looks for would stand in the shell's own command line.
    (tmp_path / "commands.sh").write_text(commands)
    output = hosts[0].run(
        "bash", "commands.sh", cwd=tmp_path, timeout_seconds=240,
        environment={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "exit code 0" in output
    assert "rank 0 was killed by SIGKILL, " in output or "rank 0 was killed by SIGKILL; " in output
    assert "resumed " in output and "rank 1, pid " in output
    assert status(tmp_path / "runs/broken")["outcome"] == "finished"


def test_a_request_to_leave_reaches_all_hosts(hosts, supervise, tmp_path):
    supervisor = supervise("--train.max_steps=100000")
    wait_for(lambda: steps_in(tmp_path / "run") >= 3, supervisor)
    hosts[0].signal(supervisor, signal.SIGTERM)
    output, _ = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 75, output
    assert status(tmp_path / "run")["outcome"] == "preempted"
    for host in hosts:
        wait_for(lambda host=host: "dtr_scale" not in host.run("ps", "-ef"))
