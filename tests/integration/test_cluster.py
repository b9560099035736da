"""Runs on two hosts, as users start them: `deepspeed --hostfile` by ssh, torchrun on each."""

import contextlib
import signal
import time

import pytest

from dtr_scale.jobs.train import train_experiment
from tests.support.ranks import run_on_ranks
from tests.support.runs import DEMO, SMALL, demo_experiment, journal, status

FP32 = (*SMALL, "--engine.precision=fp32", "--checkpoint.every_steps=10")
STEPS_60 = "--train.max_steps=60"
ENDLESS = "--train.max_steps=400"  # asked to leave long before; the output fits into a pipe
# Its arguments are the launchers' as well, and their own names stand in front.
A_RANK = "^[^ ]*python[^ ]* -u [^ ]*launch/train.py"


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """The journal of 60 steps on two ranks that nobody disturbs, on this machine."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    run_on_ranks(2, train_experiment, demo_experiment(digits, run_dir, *FP32, STEPS_60))
    return journal(run_dir)


@pytest.fixture
def by_ssh(hosts, tmp_path):
    """Start a training with a rank on each host by `deepspeed`, on the first of them."""
    # What else the ranks on other nodes are to know; users have a file `.deepspeed_env`.
    exported = tmp_path / "deepspeed_env"
    exported.write_text("OMP_NUM_THREADS=1\n")

    def start(*arguments, variables=()):
        exported.write_text("\n".join(["OMP_NUM_THREADS=1", *variables, ""]))
        return hosts[0].start(
            "deepspeed", "--hostfile", "launch/hostfile.example", "--num_gpus", "1",
            "launch/train.py", "--config", str(DEMO), *FP32, *arguments,
            environment={"DS_ENV_FILE": str(exported)},
        )  # fmt: skip

    return start


def wait_for(condition, *launchers):
    deadline = time.monotonic() + 120
    while not condition():
        for launcher in launchers:
            assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_in(run_dir):
    path = run_dir / "journal.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def ranks_on(host):
    with contextlib.suppress(AssertionError):  # pgrep found none
        return host.run("pgrep", "-f", A_RANK).split()
    return []


def test_by_ssh_two_hosts_write_the_journal_of_one_machine(
    hosts, by_ssh, digits, tmp_path, undisturbed
):
    """To the bit, although the ranks' connections are lost on the way, on both hosts."""
    run = (f"--data.shards={digits}", f"--run_dir={tmp_path}/run")
    launched = by_ssh(*run, STEPS_60)
    wait_for(lambda: steps_in(tmp_path / "run") >= 3, launched)
    hosts[0].run("pkill", "-KILL", "pdsh|ssh$")
    wait_for(lambda: not (ranks_on(hosts[0]) or ranks_on(hosts[1])))
    left = status(tmp_path / "run")
    assert (left["outcome"], left["reason"]) == ("preempted", "the launcher is gone")
    launched.communicate(timeout=30)
    output, _ = by_ssh(*run, STEPS_60).communicate(timeout=120)
    assert f"resumed {tmp_path}/run/checkpoints/step_{left['step']:08d}" in output
    assert journal(tmp_path / "run") == undisturbed


def by_torchrun(hosts, *arguments):
    """Start a training by what a user types on each host."""
    variables = {"NODES": "2", "GPUS": "1", "RENDEZVOUS": "node1:29400"}
    command = ("bash", "launch/torchrun.sh", str(DEMO), *FP32, *arguments)
    return [host.start(*command, environment=variables) for host in hosts]


def test_torchrun_starts_killed_ranks_again(hosts, digits, tmp_path, undisturbed):
    """From the newest checkpoint, also where an earlier run was to be replaced at the start."""
    run = (f"--data.shards={digits}", f"--run_dir={tmp_path}/run")
    launched = by_torchrun(hosts, *run, STEPS_60, "--checkpoint.resume=never")
    wait_for(lambda: (tmp_path / "run/checkpoints/step_00000010/COMPLETE").exists(), *launched)
    hosts[1].run("pkill", "-KILL", "-f", A_RANK)
    outputs = [launcher.communicate(timeout=120)[0] for launcher in launched]
    assert [launcher.returncode for launcher in launched] == [0, 0], outputs
    assert f"resumed {tmp_path}/run/checkpoints/step_000000" in outputs[0]
    assert journal(tmp_path / "run") == undisturbed


def test_torchrun_lets_ranks_go_that_were_asked_to_leave(hosts, digits, tmp_path):
    run = (f"--data.shards={digits}", f"--run_dir={tmp_path}/run")
    launched = by_torchrun(hosts, *run, ENDLESS)
    wait_for(lambda: steps_in(tmp_path / "run") >= 3, *launched)
    hosts[1].signal(launched[1], signal.SIGTERM)
    outputs = [launcher.communicate(timeout=60)[0] for launcher in launched]
    assert [launcher.returncode for launcher in launched] == [75, 75], outputs
    left = status(tmp_path / "run")
    assert (left["outcome"], left["reason"]) == ("preempted", "SIGTERM")
    assert len([line for line in outputs[0].splitlines() if "ZeRO-1 fp32" in line]) == 1
