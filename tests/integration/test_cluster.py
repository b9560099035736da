"""Runs on two hosts, as users start them: `deepspeed --hostfile` by ssh, torchrun on each.

The last test is the whole: shards and checkpoints on S3, MLflow over PostgreSQL, a host that dies.
"""

import contextlib
import signal

import pytest

from dtr_scale.jobs.train import train_experiment
from tests.support.ceph import CephServer
from tests.support.mlflow_server import mlflow_server
from tests.support.processes import wait_for
from tests.support.ranks import run_on_ranks
from tests.support.runs import (
    DEMO,
    ROOT,
    SMALL,
    demo_experiment,
    journal,
    status,
    steps_in,
    train,
)
from tests.support.typed import commands_of, like_the_repository

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

    def start(*arguments, variables=None):
        lines = {"OMP_NUM_THREADS": "1", **(variables or {})}
        exported.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        return hosts[0].start(
            "deepspeed", "--hostfile", "launch/hostfile.example", "--num_gpus", "1",
            "launch/train.py", "--config", str(DEMO), *FP32, *arguments,
            environment={"DS_ENV_FILE": str(exported), **(variables or {})},
        )  # fmt: skip

    return start


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
    assert len([line for line in "".join(outputs).splitlines() if "zero-1, fp32" in line]) == 1


@pytest.mark.slow
def test_the_commands_of_the_readme_train_on_two_hosts(hosts, tmp_path):
    """As they stand in "On a cluster", in a folder that both hosts have."""
    folder = like_the_repository(tmp_path)
    # The tree under test, wherever the environment's own installation is.
    here = {"PYTHONPATH": str(ROOT)}
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    prepared, by_ssh, by_torchrun = (
        ("bash", "-ec", commands_of("launch/README.md", heading))
        for heading in ("## On a cluster", "### By ssh", "### By torchrun")
    )
    hosts[0].run(*prepared, cwd=folder, environment=here, timeout_seconds=120)
    output = hosts[0].run(*by_ssh, cwd=folder, environment=here, timeout_seconds=240)
    assert output.startswith("node1\nnode2\n")
    assert "on 2 hosts (node1, node2)" in output
    assert status(folder / "runs/by_ssh")["outcome"] == "finished"
    launched = [host.start(*by_torchrun, cwd=folder, environment=here) for host in hosts]
    outputs = [launcher.communicate(timeout=240)[0] for launcher in launched]
    assert [launcher.returncode for launcher in launched] == [0, 0], outputs
    assert journal(folder / "runs/by_torchrun") == journal(folder / "runs/by_ssh")


@pytest.fixture(scope="module")
def servers(hosts, tmp_path_factory):
    """An S3 server and MLflow over PostgreSQL, which the hosts reach; their variables."""
    folder = tmp_path_factory.mktemp("servers")
    key = "hostskey"
    secret = "very-secret"
    s3 = CephServer(folder, key, secret, "bucket", host=hosts.address)
    with contextlib.ExitStack() as stack:
        stack.callback(s3.shut_down)
        uri = stack.enter_context(mlflow_server(folder, hosts.address))
        yield {
            "AWS_ENDPOINT_URL": s3.endpoint_url,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_TRACKING_URI": uri,
        }


def test_a_run_outlives_its_hosts(hosts, servers, by_ssh, digits, tmp_path, undisturbed):
    """One host is killed; the run goes on on both, later on the other host alone."""
    run_dir, steps = tmp_path / "run", "--train.max_steps=150"
    places = ("--data.shards=s3://bucket/digits", "--checkpoint.dir=s3://bucket/run")
    run = (*places, f"--run_dir={run_dir}", "--tracking.type=mlflow", steps)
    prepare = ("dtr-scale", "prepare", "digits", "--out", "s3://bucket/digits")
    hosts[0].run(*prepare, environment=servers)

    first = by_ssh(*run, variables=servers)
    wait_for(lambda: steps_in(run_dir) and status(run_dir)["saved_step"] == 10, first)
    hosts[1].kill()
    output, _ = first.communicate(timeout=60)
    assert first.returncode and status(run_dir)["outcome"] == "failed", output
    hosts[1].boot()

    second = by_ssh(*run, variables=servers)
    wait_for(lambda: steps_in(run_dir) >= 30, second)
    hosts[0].signal(second, signal.SIGTERM)
    output, _ = second.communicate(timeout=60)
    wait_for(lambda: not (ranks_on(hosts[0]) or ranks_on(hosts[1])))
    left = status(run_dir)
    assert left["outcome"] == "preempted" and left["step"] == left["saved_step"] < 150, output
    assert "resumed s3://bucket/run/step_000000" in output

    alone = ("deepspeed", "--num_gpus", "1", "launch/train.py", "--config", str(DEMO), *FP32, *run)
    output = hosts[1].run(*alone, environment=servers)
    assert f"resumed s3://bucket/run/step_{left['step']:08d}" in output
    assert status(run_dir)["outcome"] == "finished"

    found = journal(run_dir)
    assert [record["step"] for record in found] == list(range(1, 151))
    on_both = min(left["step"], len(undisturbed))
    assert found[:on_both] == undisturbed[:on_both]
    assert train(digits, tmp_path / "single", steps) == 0
    for ours, theirs in zip(found, journal(tmp_path / "single"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours == pytest.approx(theirs, rel=1e-3)

    from mlflow import MlflowClient

    client = MlflowClient(servers["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    attempts = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    (logged,) = [run for run in attempts if "dtr_scale.attempt" not in run.data.tags]
    attempts.remove(logged)
    assert logged.info.status == "FINISHED"
    told = [(run.info.status, run.data.tags["world_size"]) for run in attempts]
    assert told == [("FAILED", "2"), ("KILLED", "2"), ("FINISHED", "1")]
    losses = client.get_metric_history(logged.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in losses] == [
        (record["step"], record["loss"]) for record in found
    ]
