"""Requests to leave, with real signals to real processes."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest

from dtr_scale.signals import LAUNCHER_PID, LeaveRequest

# Says "ready", waits for a reason to leave, says it.
RANK = """
import time
from dtr_scale.signals import LeaveRequest
leave = LeaveRequest()
with leave.listening():
    print("ready", flush=True)
    while leave.reason is None:
        time.sleep(0.01)
    print(leave.reason, flush=True)
"""
# The same, and then still has work to do.
BUSY_RANK = RANK + "    time.sleep(60)\n"


@pytest.fixture
def start(popen):
    """Start a script and wait until it is ready."""

    def start(script, *before):
        process = popen([*before, sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == "ready\n"
        return process

    return start


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_is_the_reason_to_leave(start, name):
    rank = start(RANK)
    rank.send_signal(signal.Signals[name])
    assert rank.communicate(timeout=20)[0] == f"{name}\n"
    assert rank.returncode == 0


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_the_second_sigint_leaves_at_once(start, first):
    rank = start(BUSY_RANK)
    rank.send_signal(signal.Signals[first])
    assert rank.stdout.readline() == f"{first}\n"
    if first == "SIGTERM":
        # More of another kind are no reason to hurry.
        rank.send_signal(signal.SIGTERM)
        rank.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            rank.wait(0.3)
    rank.send_signal(signal.SIGINT)
    assert rank.wait(20) == 130


def test_an_ignored_sighup_stays_ignored(start):
    rank = start(RANK, "nohup")
    rank.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(0.3)
    rank.send_signal(signal.SIGTERM)
    assert rank.communicate(timeout=20)[0] == "SIGTERM\n"


STARTING = ("sh", "-c", '"$@" & wait')
SHELL = (*STARTING, "sh")


# One process of SLURM's has written its name over its command.
SLURMSTEPD = ("bash", "-c", """exec -a "slurmstepd: [12.0]" sh -c '"$@" & wait' sh "$@" """, "bash")


@pytest.mark.parametrize(
    "before",
    [
        (*STARTING, "/venv/bin/torchrun"),
        (*STARTING, "torch.distributed.run"),
        (*STARTING, "deepspeed"),
        SLURMSTEPD,
    ],
)
def test_a_launcher_that_is_gone_is_noticed(start, before):
    launcher = start(RANK, *before)
    launcher.kill()
    assert launcher.stdout.readline() == "the launcher is gone\n"


# Waits for its parent to go, then says whether that is a reason to leave.
LEFT_ALONE = """
import os, time
from dtr_scale.signals import LeaveRequest
parent, leave = os.getppid(), LeaveRequest()
with leave.listening():
    print("ready", flush=True)
    while os.getppid() == parent:
        time.sleep(0.01)
    print(leave.reason, flush=True)
"""


@pytest.mark.parametrize("before", [("setsid",), ("nohup",), ()])
def test_a_parent_that_launches_nothing_may_go(start, before):
    """As a shell does after `nohup dtr-scale train ... &` and a logout."""
    shell = start(LEFT_ALONE, *SHELL, *before)
    shell.kill()
    assert shell.stdout.readline() == "None\n"


# `deepspeed` starts one process that starts the ranks, which stays when `deepspeed` goes.
DEEPSPEED = (*STARTING, "deepspeed", *STARTING, "deepspeed.launcher.launch")
# On the nodes that it reaches by ssh, sshd does; its user's shell may stay as a process of its own.
SSH_NODE = (*STARTING, "deepspeed.launcher.launch")
SSHD = [
    ("bash", "-c", f"""exec -a "{name}: user@notty" sh -c '"$@" & wait' sh "$@" """, "bash", *shell)
    for name, shell in [("sshd", ()), ("sshd-session", SHELL)]
]
SCRIPT = ("sh", "-c", f'export {LAUNCHER_PID}=$$; "$@" & wait', "script")


@pytest.mark.parametrize(
    "before",
    [DEEPSPEED, (*SCRIPT, *SHELL), (*SCRIPT, *DEEPSPEED)] + [(*sshd, *SSH_NODE) for sshd in SSHD],
)
def test_a_launcher_further_up_that_is_gone_is_noticed(start, before):
    launcher = start(RANK, *before)
    launcher.kill()
    assert launcher.stdout.readline() == "the launcher is gone\n"


@pytest.mark.parametrize("before", [(*SHELL, *DEEPSPEED), (*SHELL, *SHELL), (*SSHD[0], *DEEPSPEED)])
def test_what_started_the_launcher_may_go(start, before):
    """As a shell does after `nohup deepspeed ... &`, or a connection that was typed into."""
    shell = start(RANK, *before)
    shell.kill()
    told, _, _ = select.select([shell.stdout], [], [], 0.5)
    assert not told


@pytest.mark.parametrize("alive", [True, False])
def test_a_launch_script_of_another_machine_is_nobody_here(monkeypatch, alive):
    """Its pid belongs to nobody here, or to a process that has nothing to do with the run."""
    other = subprocess.Popen(["sleep", "60"])
    monkeypatch.setenv(LAUNCHER_PID, str(other.pid))
    leave = LeaveRequest() if alive else None
    other.kill()
    other.wait()
    assert (leave or LeaveRequest()).reason is None


def test_handlers_are_put_back_and_the_reason_stays():
    before = signal.getsignal(signal.SIGUSR1)
    leave = LeaveRequest()
    with leave.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert leave.reason == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_time_limit_is_a_reason_once_it_is_over():
    leave = LeaveRequest()
    leave.enter_loop(max_minutes=60)
    assert leave.reason is None
    leave.enter_loop(max_minutes=0.1 / 60)
    time.sleep(0.11)
    assert leave.reason == "train.max_minutes = 0.00166667 are over"
