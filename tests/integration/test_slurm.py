"""Ranks that a real SLURM starts: the steps of `srun`, and jobs that come back."""

import json
import re
import shlex

import pytest

from dtr_scale.cli.main import main
from dtr_scale.jobs.paper.collect import trainings_of
from dtr_scale.jobs.paper.launches import Places, array_command
from dtr_scale.jobs.paper.tables import Row
from dtr_scale.launchers import first_host
from tests.support.processes import wait_for
from tests.support.runs import DEMO, SMALL, journal, status, steps_in, train
from tests.support.slurm import slurm_cluster
from tests.support.typed import commands_of, like_the_repository

FP32 = (*SMALL, "--engine.precision=fp32")
# The GPUs that SLURM allots here are names in its configuration.
BY_FSDP2 = (*FP32, "--engine.type=fsdp2", "--engine.device=cpu")
JOB_SCRIPT = "launch/slurm/train.sbatch"
SMALL_JOB = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
PRINT_RANK = """
import os
from dtr_scale.cli.main import main
try:
    main(["--help"])
except SystemExit:
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"
    print("rank:", *[os.environ.get(name, "-") for name in (*names, "SLURMD_NODENAME")])
"""


@pytest.fixture(scope="module")
def slurm():
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture
def submit(slurm, digits, tmp_path):
    """Submit a small training by the job script, in the run directory `tmp_path / "run"`."""

    def submitted(*overrides):
        places = (f"--data.shards={digits}", f"--run_dir={tmp_path}/run")
        return slurm.run(
            "sbatch", "--parsable", f"--output={tmp_path}/output", *SMALL_JOB,
            JOB_SCRIPT, str(DEMO), *BY_FSDP2, *places, *overrides,
        ).strip()  # fmt: skip

    yield submitted
    print((tmp_path / "output").read_text(encoding="utf-8"))  # shown where a test failed


def known_ranks(slurm, *options):
    """Return, sorted, what the tasks of a step take themselves for."""
    printed = slurm.run("srun", *options, "python", "-c", PRINT_RANK)
    return sorted(line.removeprefix("rank: ") for line in printed.splitlines() if "rank: " in line)


def job_has(slurm, job, field):
    return f"{field} " in slurm.run("scontrol", "show", "job", job)


def test_tasks_know_their_ranks_and_gpus(slurm):
    first, second = slurm.nodes
    assert known_ranks(slurm, "--nodes=2", "--ntasks=3", "--gpus-per-task=1") == [
        f"0 0 3 2 0 {first}",
        f"1 1 3 2 1 {first}",
        f"2 0 3 1 0 {second}",
    ]
    assert known_ranks(slurm, "--ntasks=1") == [f"- - - - - {first}"]


@pytest.mark.parametrize(
    "nodelist",
    ["gpu7", "gpu[003-010,012],login", "b,a[2-3]", "r[1-2]n[03-04]", "a-1,b[0-1]"],
)
def test_the_first_host_is_slurms(slurm, nodelist):
    assert first_host(nodelist) == slurm.run("scontrol", "show", "hostnames", nodelist).split()[0]


def test_two_tasks_train_and_sample_as_one_process_does(slurm, digits, tmp_path):
    places = (f"--data.shards={digits}", f"--run_dir={tmp_path}/srun")
    command = ("dtr-scale", "train", "--config", str(DEMO), *FP32, *places, "--train.max_steps=20")
    slurm.run("srun", "--nodes=2", "--ntasks=2", *command, timeout_seconds=120)
    assert train(digits, tmp_path / "single", "--train.max_steps=20") == 0
    found, expected = journal(tmp_path / "srun"), journal(tmp_path / "single")
    assert len(found) == 20
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    saved = (tmp_path / "srun").glob("checkpoints/step_00000020/rank_*.safetensors")
    assert len(list(saved)) == 2, "each rank has its part"

    # Batches of 2 are dealt to the tasks in turn.
    of_run = ("sample", str(tmp_path / "srun"), "--num-samples=6", "--evaluation.batch_size=2")
    few = (*of_run, "--evaluation.num_sampling_steps=2", "--out")
    out, alone = tmp_path / "srun.npz", tmp_path / "alone.npz"
    slurm.run("srun", "--nodes=2", "--ntasks=2", "dtr-scale", *few, str(out), timeout_seconds=120)
    assert main([*few, str(alone)]) == 0
    assert out.read_bytes() == alone.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """The journal of 50 steps of one process."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert train(digits, run_dir, "--train.max_steps=50") == 0
    return journal(run_dir)


@pytest.mark.parametrize("reason", ["SIGUSR1", "SIGTERM"], ids=["time limit", "preemption"])
def test_a_job_told_to_leave_comes_back_and_goes_on(slurm, submit, undisturbed, tmp_path, reason):
    """USR1 to every process of the job, data workers too; SLURM sends it before the time limit.

    SLURM itself sends TERM to the ranks when a job of higher priority wants their nodes.
    What the job was asked to do at its first start, to begin afresh, is not done again.
    """
    run_dir, output = tmp_path / "run", tmp_path / "output"
    never = "--checkpoint.resume=never"
    job = submit("--train.max_steps=50", "--data.num_workers=1", never)
    wait_for(lambda: steps_in(run_dir) >= 3)
    if reason == "SIGUSR1":
        slurm.run("scancel", "--full", "--signal=USR1", job)
    else:
        urgent = ("--partition=urgent", "--nodes=2", "--gpus-per-node=2")
        # It waits for the nodes, which are given to it well before the time of grace is over.
        slurm.run("srun", *urgent, "true", timeout_seconds=40)
    wait_for(lambda: job_has(slurm, job, "JobState=COMPLETED"))
    assert job_has(slurm, job, "Restarts=1")
    assert status(run_dir)["outcome"] == "finished"
    told = output.read_text(encoding="utf-8")
    ((found_reason, step),) = re.findall(r"leaving on request \((\w+)\) at step (\d+);", told)
    assert (found_reason, int(step) < 50) == (reason, True)
    assert f"resumed {run_dir}/checkpoints/step_{int(step):08d}" in told
    assert "Traceback" not in told and "warning" not in told.lower(), told
    found = journal(run_dir)
    assert [record["step"] for record in found] == list(range(1, 51))
    for ours, theirs in zip(found, undisturbed, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_commands_of_the_readme_train_on_two_nodes(slurm, tmp_path):
    """As they stand in "By a scheduler"; `status` is asked again when the job has ended."""
    folder = like_the_repository(tmp_path)
    slurm.run("bash", "-ec", commands_of("launch/README.md", "## On a cluster"), cwd=folder)
    typed = commands_of("launch/README.md", "### By a scheduler")
    submit, _, look = typed.partition("squeue")
    job = slurm.run("bash", "-ec", submit, cwd=folder).split()[-1]
    wait_for(lambda: job_has(slurm, job, "JobState=COMPLETED"))
    told = slurm.run("bash", "-ec", f"squeue{look}", cwd=folder)
    assert "finished" in told
    assert "2 x cpu" in (folder / f"slurm-{job}.out").read_text(encoding="utf-8")


def test_a_job_array_trains_a_line_each(slurm, digits, tmp_path):
    """As `dtr-scale reproduce --slurm` submits it; a name with a blank survives."""
    trainings = [
        trainings_of(Row("", ("demo_digits",)), DEMO.parent, [
                     *BY_FSDP2, f"--data.shards={digits}", f"--train.max_steps={steps}",
                     f"--name=steps{steps}", f"--description=of {steps} steps"])[0]
        for steps in (2, 3)
    ]  # fmt: skip
    places = Places(DEMO.parent, tmp_path / "all runs", None)
    options = shlex.join(["--parsable", f"--output={tmp_path}/output-%a", *SMALL_JOB])
    job = slurm.run(*array_command(trainings, places, options, "demo")).strip()
    wait_for(lambda: not slurm.run("squeue", "--noheader", f"--jobs={job}"))
    for steps in (2, 3):
        run_dir = tmp_path / "all runs" / f"steps{steps}"
        assert (status(run_dir)["outcome"], status(run_dir)["step"]) == ("finished", steps)
        config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        assert config["description"] == f"of {steps} steps"


@pytest.mark.parametrize("how", [(), ("--batch", "--signal=TERM")], ids=["all", "script"])
def test_a_cancelled_job_saves_and_stays_away(slurm, submit, tmp_path, how):
    job = submit("--train.max_steps=100000")
    wait_for(lambda: steps_in(tmp_path / "run") >= 3)
    slurm.run("scancel", *how, job)
    wait_for(lambda: not slurm.run("squeue", "--noheader", f"--jobs={job}"))
    assert job_has(slurm, job, "Restarts=0")
    left = status(tmp_path / "run")
    assert left["outcome"] == "preempted"
    assert (tmp_path / "run" / "checkpoints" / f"step_{left['step']:08d}" / "COMPLETE").exists()
