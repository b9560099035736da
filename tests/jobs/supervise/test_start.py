"""What the command accepts, to whom it gives way, and the hosts that it reaches by ssh."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dtr_scale.cli.main import main
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.supervise.ssh import HostLine, read_hostfile
from tests.support.processes import wait_for
from tests.support.runs import DEMO, ROOT, SINGLE, SMALL, journal, status, steps_in, train

TRAINING = ("--", "--config", str(DEMO))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nnodes", "2"], "needs --rdzv-endpoint HOST:PORT"),
        (["--nnodes", "2", "--node-rank", "2"], "give 0 to 1"),
        (["--rdzv-endpoint", "node1"], "give HOST:PORT as node1:29400"),
        (["--hostfile", "nowhere"], "--hostfile nowhere cannot be read"),
        (["--hostfile", "hosts", "--nnodes", "2"], "names all nodes"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_a_rank_is_started(options, message, capsys, monkeypatch):
    monkeypatch.setattr("dtr_scale.jobs.supervise.start.hand_signals_on", lambda signals: None)
    monkeypatch.setitem(os.environ, "DTR_SCALE_LAUNCHER_PID", "")
    assert main(["supervise", *options, *TRAINING]) == 2
    assert message in capsys.readouterr().err


def test_a_mistake_of_the_training_is_told_at_once(capsys):
    assert main(["supervise", *TRAINING, "--train.max_stps=5"]) == 2
    assert "unknown key train.max_stps; did you mean train.max_steps?" in capsys.readouterr().err


def test_a_hostfile_is_deepspeeds(tmp_path):
    here = socket.gethostname()
    path = tmp_path / "hostfile"
    path.write_text(f"# two nodes\n\n{here} slots=8\nnode-2.example  # all of its GPUs\n")
    assert read_hostfile(path) == [HostLine(here, 8), HostLine("node-2.example", None)]
    path.write_text("192.0.2.1 slots=8\n")
    with pytest.raises(ConfigError, match=f"the first host is 192.0.2.1, this is {here}"):
        read_hostfile(path)
    path.write_text("node1 slots=many\n")
    with pytest.raises(ConfigError, match="accepted is NAME or NAME slots=8"):
        read_hostfile(path)


def test_a_machine_knows_its_own_name_where_no_name_server_does(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node-1.invalid")
    path = tmp_path / "hostfile"
    path.write_text("node-1.invalid\n")
    assert read_hostfile(path) == [HostLine("node-1.invalid", None)]


@pytest.fixture
def start(digits, popen):
    """Start the supervisor of a small training in one process."""

    def start(run_dir, *overrides, variables=None, restarts="2"):
        command = [
            sys.executable, "-m", "dtr_scale", "supervise", "--nproc", "1", "--restarts", restarts,
            *TRAINING, *SMALL, *SINGLE, f"--data.shards={digits}", f"--run_dir={run_dir}",
            *overrides,
        ]  # fmt: skip
        environment = os.environ | (variables or {})
        return popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return start


def rank_of(supervisor):
    """Return the pid of a supervisor's only rank."""
    return int(Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text())


ENDLESS = "--train.max_steps=100000"


@pytest.mark.slow
def test_a_killed_rank_goes_on_from_its_checkpoint(digits, tmp_path, start):
    """Twice: also where an earlier run was to be replaced, which happens once for a launch."""
    steps = ("--train.max_steps=300", "--checkpoint.every_steps=20")
    run_dir = tmp_path / "run"
    assert train(digits, run_dir, "--train.max_steps=5") == 0
    supervisor = start(run_dir, *steps, "--checkpoint.resume=never")
    for before in (25, 60):
        # `replaced_*` has the earlier run's five.
        wait_for(lambda before=before: steps_in(run_dir) > before, supervisor)
        os.kill(rank_of(supervisor), signal.SIGKILL)
    output, _ = supervisor.communicate(timeout=120)
    assert supervisor.returncode == 0, output
    assert output.count("rank 0 was killed by SIGKILL; all ranks are started again in 1 s") == 2
    assert output.count("fresh start: ") == 1
    assert output.count("resumed ") == 2
    assert train(digits, tmp_path / "through", *steps) == 0
    assert journal(run_dir) == journal(tmp_path / "through")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_request_to_leave_is_handed_on_and_final(tmp_path, start, number):
    supervisor = start(tmp_path / "run", ENDLESS)
    wait_for(lambda: steps_in(tmp_path / "run") >= 3, supervisor)
    supervisor.send_signal(number)
    output, _ = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 75, output
    left = status(tmp_path / "run")
    assert (left["outcome"], left["reason"]) == ("preempted", number.name)
    assert left["saved_step"] == left["step"]


@pytest.mark.slow
def test_ranks_leave_when_their_supervisor_is_gone(tmp_path, start):
    supervisor = start(tmp_path / "run", ENDLESS)
    wait_for(lambda: steps_in(tmp_path / "run") >= 3, supervisor)
    supervisor.kill()
    supervisor.communicate(timeout=60)  # the rank has the pipe as well
    left = status(tmp_path / "run")
    assert (left["outcome"], left["reason"]) == ("preempted", "the launcher is gone")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"SLURM_JOB_ID": "7"}, "SLURM starts again what has failed; here it is started once"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "Kubernetes starts again what has failed"),
    ],
)
def test_a_scheduler_restarts_by_itself(tmp_path, start, variables, told):
    supervisor = start(tmp_path / "run", ENDLESS, variables=variables)
    wait_for(lambda: steps_in(tmp_path / "run") >= 3, supervisor)
    os.kill(rank_of(supervisor), signal.SIGKILL)
    output, _ = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 1, output
    assert told in output and "restart 0 of 0 was the last" in output


@pytest.mark.slow
def test_under_torchrun_it_is_the_training(tmp_path, start):
    variables = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}
    rank = start(tmp_path / "run", "--train.max_steps=2", variables=variables)
    output, _ = rank.communicate(timeout=60)
    assert rank.returncode == 0, output
    assert "torchrun starts again what has failed" in output
    assert status(tmp_path / "run")["outcome"] == "finished"
