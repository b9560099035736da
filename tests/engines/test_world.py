"""A rank takes one GPU of its node and its share of the cores; all of them hear of a failure."""

import os

import pytest
import torch

from dtr_scale.config.schema import EngineConfig
from dtr_scale.engines.world import _own_gpu, _share_cores, join_world
from dtr_scale.errors import ConfigError, DataError, EngineError
from tests.support.ranks import run_on_ranks


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


@pytest.mark.parametrize(
    ("replicate", "shard", "expected"),
    [(None, None, (1, 8)), (2, None, (2, 4)), (None, 4, (2, 4)), (4, 2, (4, 2)), (8, None, (8, 1))],
)
def test_a_mesh_uses_every_rank(replicate, shard, expected):
    assert EngineConfig(replicate=replicate, shard=shard).mesh(8) == expected


@pytest.mark.parametrize(("replicate", "shard"), [(2, 3), (3, None), (None, 16), (16, None)])
def test_a_mesh_that_does_not_fit_is_refused(replicate, shard):
    with pytest.raises(ConfigError, match=r"engine\.\w+ = \d+ .*do not fit 8 ranks: replicate x"):
        EngineConfig(replicate=replicate, shard=shard).mesh(8)


def verdicts() -> list[str]:
    """What a rank is told when rank 1 alone fails, in ways we know and do not know."""
    world = join_world(needs_process_group=True)
    told = []
    for error in (DataError("a shard is missing"), KeyError("surprise")):
        try:
            with world.agree():
                if world.rank == 1:
                    raise error
        except (DataError, EngineError) as verdict:
            told.append(f"{type(verdict).__name__}: {verdict} {verdict.on_every_rank}")
    with world.agree():
        told.append("none")
    world.leave()
    return told


def test_all_ranks_get_the_verdict_of_the_one_that_failed():
    first, second = run_on_ranks(2, verdicts)
    assert (
        first
        == second
        == [
            "DataError: a shard is missing True",
            "EngineError: rank 1 failed: KeyError: 'surprise' True",
            "none",
        ]
    )
