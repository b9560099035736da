"""Rank and world size of a process, from `deepspeed`, `torchrun` and `srun`."""

import pytest

from dtr_scale.launchers import (
    first_host,
    launched_rank,
    launched_world_size,
    restart_count,
    srun_variables,
)

BATCH_SCRIPT = {  # of `sbatch --nodes=2 --ntasks-per-node=2`: the first task's, but in no step
    "SLURM_JOB_ID": "70042",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_GTIDS": "0",
}
TASK = BATCH_SCRIPT | {  # the last of `srun` in it
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_GTIDS": "2,3",
}


def test_rank_and_world_size_are_the_launchers(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (launched_rank(), launched_world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (launched_rank(), launched_world_size()) == (5, 8)


def test_restarts_are_those_of_slurm_and_of_torchrun(monkeypatch):
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert restart_count() == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert restart_count() == 2


def test_a_task_of_srun_is_a_rank():
    assert srun_variables(TASK) == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20244",
    }


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH_SCRIPT,
        TASK | {"RANK": "0", "WORLD_SIZE": "32"},
        TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
    ids=["no SLURM", "batch script", "torchrun in a task", "the only task"],
)
def test_no_other_process_is(environment):
    assert srun_variables(environment) == {}


def test_the_meeting_place_can_be_chosen():
    chosen = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    assert srun_variables(TASK | chosen).items() >= chosen.items()


def test_jobs_and_steps_meet_at_ports_of_their_own():
    places = [(job, step) for job in range(40000, 40050) for step in range(4)]
    ports = {
        int(srun_variables(TASK | {"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)})["MASTER_PORT"])
        for j, s in places
    }
    assert len(ports) == len(places)
    assert 10000 <= min(ports) <= max(ports) < 30000


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu[003-010,12],login", "gpu003"),
        ("b,a[2-3]", "b"),
        ("r[1-2]n[03-04]", "r1n03"),
        ("a-1,b[0-1]", "a-1"),
    ],
)
def test_the_first_host_of_a_list(nodelist, host):
    assert first_host(nodelist) == host
