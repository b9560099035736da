"""Choose the device of a rank: a GPU of its own, or the CPU if that was meant."""

import ctypes
import os
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import Store

from dtr_scale.errors import EngineError
from dtr_scale.launchers import local_world_size

_HIDDEN = ("", "-1", "NoDevFiles")  # what hides every GPU in CUDA_VISIBLE_DEVICES
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def choose_device(name: str, local_rank: int) -> torch.device:
    """Return the device that `name` (auto, cuda or cpu) means for a rank of this machine.

    "auto" is a GPU where there is one, else the CPU. Raises EngineError where a GPU was allotted
    and cannot be used: a driver that does not fit would train on the CPU for days.
    """
    if name == "cpu":
        # For all that asks later: pinned memory, DeepSpeed's accelerator, the data workers.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda.is_available():
        device = _own_gpu(local_rank)
        # Before the first collective: gathers of objects use the current device.
        torch.cuda.set_device(device)
        return device
    else:
        sign = "engine.device = 'cuda'" if name == "cuda" else _sign_of_a_gpu(os.environ)
        if sign:
            raise EngineError(
                f"{sign}: a GPU should be here, and PyTorch cannot use it ({_obstacle()}); check "
                "nvidia-smi, the driver and the container's GPU options, or give engine.device=cpu"
            )
    _share_cores()
    _keep_memory()
    return torch.device("cpu")


def refuse_shared_gpus(store: Store, rank: int, world_size: int, gpu: str) -> None:
    """Raise EngineError on every rank if two of them have the same `gpu` of the same machine.

    NCCL would hang, or end with "Duplicate GPU detected". It cannot be asked before it has begun,
    so the ranks meet in the store that they were given to find each other.
    """
    store.set(f"gpu/{rank}", gpu)
    if rank == 0:
        gpus = [store.get(f"gpu/{other}").decode() for other in range(world_size)]
        store.set("gpu/shared", ",".join(map(str, _ranks_of_a_shared(gpus))))
    if shared := store.get("gpu/shared").decode():
        error = EngineError(
            f"ranks {shared} have one GPU between them; start one process per GPU (deepspeed "
            "--num_gpus, torchrun --nproc_per_node), or let the scheduler show each rank its own"
        )
        error.on_every_rank = True
        raise error


def gpu_name(device: torch.device) -> str:
    """Return what tells a GPU from all others of a job."""
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def _ranks_of_a_shared(gpus: Iterable[str]) -> list[int]:
    ranks: dict[str, list[int]] = {}
    for rank, gpu in enumerate(gpus):
        ranks.setdefault(gpu, []).append(rank)
    return next((sharing for sharing in ranks.values() if len(sharing) > 1), [])


def _own_gpu(local_rank: int) -> torch.device:
    """Return this rank's GPU: the only one that its scheduler shows it, or one per local rank."""
    num_gpus = torch.cuda.device_count()
    if num_gpus > 1 and local_rank >= num_gpus:
        raise EngineError(
            f"local rank {local_rank} has no GPU of its own: this node has {num_gpus}; start at "
            f"most {num_gpus} processes per node"
        )
    return torch.device("cuda", local_rank if num_gpus > 1 else 0)


def _sign_of_a_gpu(environment: Mapping[str, str], devices: Path = Path("/dev")) -> str | None:
    """Return what says that this process was given a GPU, None if nothing does."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible in _HIDDEN:  # what a scheduler or the user decided
        return None
    # DeepSpeed's launcher sets it for its ranks on machines without a GPU as well.
    if visible is not None and "CROSS_SIZE" not in environment:
        return f"CUDA_VISIBLE_DEVICES = {visible}"
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        if (value := environment.get(name, "")) not in ("", "0"):
            return f"{name} = {value}"
    gpus = sorted(path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    return f"{gpus[0]} exists" if gpus else None


def _obstacle() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the second from a build without CUDA
        return str(error).strip().splitlines()[0].rstrip(".")
    return "torch.cuda.is_available() is false"


def _share_cores() -> None:
    """Give each rank of this machine its share of the cores: too many threads are 10x slower."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        # SLURM counts the job's cores of this node, and may have bound each rank to its share.
        on_node = int(os.environ.get("SLURM_CPUS_ON_NODE") or cores)
        torch.set_num_threads(max(1, min(cores, on_node // local_world_size())))


def _keep_memory() -> None:
    """Let malloc keep what is freed, for the next step.

    It would give a step's activations back to the kernel, which clears each page anew in the next
    one: 5 to 8% of a compiled step of DiT-S/2.
    """
    # Of glibc alone. Whoever has set malloc's own variables, or preloaded another, keeps them.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)  # else every tensor above 32 MB is mapped and unmapped
