"""A rank takes one GPU of its node, and its share of the cores."""

import os

import pytest
import torch

from dtr_scale.engines.world import _own_gpu, _share_cores
from dtr_scale.errors import EngineError


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
