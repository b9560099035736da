"""A rank takes a GPU of its own, or its share of the cores; never the CPU by mistake."""

import ctypes
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from dtr_scale.engines.device import (
    _own_gpu,
    _share_cores,
    _sign_of_a_gpu,
    choose_device,
    refuse_shared_gpus,
)
from dtr_scale.errors import EngineError

SIGNS = ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(4, 3, 3), (1, 0, 0), (1, 3, 0)])
def test_a_rank_has_one_gpu(monkeypatch, visible, local_rank, index):
    """`srun --gpus-per-task=1` shows each rank its own alone."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert _own_gpu(local_rank) == torch.device("cuda", index)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EngineError, match="local rank 2 has no GPU of its own"):
        _own_gpu(2)


@pytest.mark.parametrize(
    ("cores", "launcher", "threads"),
    [
        (8, {}, 8),
        (8, {"LOCAL_WORLD_SIZE": "2"}, 4),
        (8, {"LOCAL_SIZE": "16"}, 1),
        (64, {"LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_ON_NODE": "8"}, 4),
        (4, {"LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_ON_NODE": "8"}, 4),
    ],
    ids=["alone", "torchrun", "too many", "srun", "srun that binds"],
)
def test_ranks_share_the_cores(monkeypatch, cores, launcher, threads):
    given = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    _share_cores()
    assert given == [threads]


@pytest.fixture
def no_signs(monkeypatch):
    for name in SIGNS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "sign"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES = 0,1"),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "8"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0", "CROSS_SIZE": "1"}, None),  # deepspeed on a CPU
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE = 8"),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
    ],
)
def test_what_tells_of_a_gpu(tmp_path, environment, sign):
    assert _sign_of_a_gpu(environment, tmp_path) == sign


def test_a_gpus_device_file_tells_of_it_unless_it_is_hidden(tmp_path):
    (tmp_path / "nvidiactl").touch()
    assert _sign_of_a_gpu({}, tmp_path) is None
    (tmp_path / "nvidia0").touch()
    assert _sign_of_a_gpu({}, tmp_path) == f"{tmp_path}/nvidia0 exists"
    assert _sign_of_a_gpu({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_gpu_that_cannot_be_used_is_no_silent_cpu_run(no_signs, monkeypatch):
    with pytest.raises(EngineError, match=r"engine\.device = 'cuda'.*(driver|CUDA).*=cpu"):
        choose_device("cuda", 0)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(EngineError, match="SLURM_GPUS_ON_NODE = 8: a GPU should be here"):
        choose_device("auto", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_device("cpu", 0) == torch.device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("gpus", "shared"), [(("a 1", "a 2", "b 1"), None), (("a 1", "b 1", "a 1"), "0,2")]
)
def test_ranks_that_share_a_gpu_are_all_told(gpus, shared):
    store, told = HashStore(), {}

    def join(rank):
        try:
            refuse_shared_gpus(store, rank, len(gpus), gpus[rank])
            told[rank] = None
        except EngineError as error:
            assert error.on_every_rank
            told[rank] = str(error).partition(" have one GPU")[0]

    ranks = [threading.Thread(target=join, args=(rank,)) for rank in range(len(gpus))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert told == dict.fromkeys(range(len(gpus)), shared and f"ranks {shared}")


_FAULTS = """
import resource, torch
from dtr_scale.engines.device import choose_device
choose_device("cpu", 0)
def faults():
    torch.ones(12_000_000)  # 48 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
# The first ones come to lie one behind the other: glibc 2.36 sets the ends of seven blocks aside.
counts = [faults() for _ in range(16)]
print(counts[-1] - counts[-4])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_memory_is_kept_for_the_next_step_unless_the_user_has_settings(environment, kept):
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", _FAULTS]
    told = subprocess.run(command, env=plain | environment, capture_output=True, check=True)
    assert (int(told.stdout) < 1000) == kept
