"""Read this process's rank and world from the variables that its launcher set.

RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from `deepspeed` or `torchrun`;
`srun` has names of its own.
"""

import os
import re
from collections.abc import Mapping


def launched_rank() -> int:
    """Return this process's global rank as its launcher set it, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Return how many processes the launcher started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return how many of them are on this machine."""
    # torchrun sets the first, deepspeed the second, neither both.
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def restart_count() -> int:
    """Return how often a launcher has started this job again: SLURM's requeues, torchrun's."""
    # Both count from 0: SLURM requeues the job, torchrun restarts its ranks inside of it.
    counts = (
        os.environ.get(name) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    )
    return sum(int(count or 0) for count in counts)


def launch_name() -> str:
    """Return what tells a launch from others and stays when it is started again, "" for none."""
    # torchrun's is "none" unless it is given: callers must not take two launches for one.
    names = (os.environ.get(name) for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"))
    return "/".join(filter(None, names))


def restarting_launcher() -> str | None:
    """Return the name of a launcher that starts failed jobs again by itself, if one is here."""
    variables = {
        "TORCHELASTIC_RUN_ID": "torchrun",
        "SLURM_JOB_ID": "SLURM",
        "KUBERNETES_SERVICE_HOST": "Kubernetes",
        "RANK": "the launcher",
    }
    return next((launcher for name, launcher in variables.items() if name in os.environ), None)


def srun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what another launcher would have set for this task of an `srun` with several.

    Nothing for any other process: the only task of a step, a batch script, which is in no step,
    and the ranks of a launcher that `srun` started. MASTER_ADDR and MASTER_PORT can be set by hand.
    """
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if num_tasks == "1" or "RANK" in environment:
        return {}
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    # All tasks reckon the same port, before they can talk: below those that systems give to
    # outgoing connections, and another for each step, since a job may run several.
    port = 10000 + (job + 101 * step) % 20000
    # The global ids of this node's tasks, separated by commas.
    tasks_of_node = environment["SLURM_GTIDS"].split(",")
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": num_tasks,
        "LOCAL_WORLD_SIZE": str(len(tasks_of_node)),
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def first_host(nodelist: str) -> str:
    """Return the first host of SLURM's notation: `gpu003` of `gpu[003-010,12],login`.

    Containers that `srun` starts have no `scontrol` to ask.
    """
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodelist).partition(",")[0]
