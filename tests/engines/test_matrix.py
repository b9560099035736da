"""Every engine in every precision at every world size, and every pair of them on one run."""

import shutil

import pytest

from tests.support.engine_jobs import (
    HALF,
    HALF_WAY,
    LONE,
    Job,
    assert_same,
    losses,
    setting,
    train_all,
    train_on_ranks,
)
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = 1200
SHARDED = ("zero0", "zero1", "zero2", "zero3", "fsdp2", "flat")
ENGINES = {1: ("single", *SHARDED), 2: SHARDED, 4: (*SHARDED, "hsdp")}
PLACES = [
    ("single", 1),
    *((engine, 2) for engine in ("zero1", "zero2", "zero3", "fsdp2", "flat")),
    ("fsdp2", 4),
]


@pytest.fixture(scope="module")
def reference(digits, tmp_path_factory):
    job = Job("reference", setting("single_fp32"))
    return train_all(digits, tmp_path_factory.mktemp("reference"), [job], LONE)["reference"]


def deviation(found, expected, key):
    """Return the largest relative difference of a figure over all steps."""
    return max(abs(f[key] - e[key]) / abs(e[key]) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("world_size", ENGINES)
def test_every_engine_trains_the_same_network(digits, tmp_path, reference, world_size, capsys):
    names = [f"{engine}_{p}" for engine in ENGINES[world_size] for p in ("fp32", "bf16")]
    jobs = [Job(name, setting(name)) for name in names]
    ranks = run_on_ranks(
        world_size, train_on_ranks, digits, tmp_path, jobs, timeout_seconds=TIMEOUT_SECONDS
    )
    for name in names:
        figures = {key: deviation(ranks[0][name], reference, key) for key in ("loss", "grad_norm")}
        with capsys.disabled():
            told = ", ".join(f"{key} {value:.1e}" for key, value in figures.items())
            print(f"\n{world_size} ranks, {name}: {told}", end="")
    for name in names:
        assert_same(ranks[0][name], reference, name.partition("_")[2])
        for rank in ranks[1:]:
            assert losses(rank[name]) == losses(ranks[0][name]), name


def test_every_engine_goes_on_from_every_other(digits, tmp_path, reference, capsys):
    def train(world_size, jobs):
        if world_size == 1:
            return train_all(digits, tmp_path, jobs, LONE)
        return run_on_ranks(
            world_size, train_on_ranks, digits, tmp_path, jobs, timeout_seconds=TIMEOUT_SECONDS
        )[0]

    for world_size in (1, 2, 4):
        engines = [engine for engine, size in PLACES if size == world_size]
        train(
            world_size,
            [
                Job(f"{engine}_x{world_size}", (*setting(f"{engine}_fp32"), HALF_WAY))
                for engine in engines
            ],
        )
    saved = [f"{engine}_x{size}" for engine, size in PLACES]
    for world_size in (1, 2, 4):
        engines = [engine for engine, size in PLACES if size == world_size]
        pairs = [(before, engine) for engine in engines for before in saved]
        jobs = []
        for before, engine in pairs:
            name = f"{before}_then_{engine}_x{world_size}"
            shutil.copytree(tmp_path / before, tmp_path / name)
            jobs.append(Job(name, setting(f"{engine}_fp32"), resume=True))
        for name, records in train(world_size, jobs).items():
            with capsys.disabled():
                print(f"\n{name}: loss {deviation(records, reference[HALF:], 'loss'):.1e}", end="")
            assert_same(records, reference[HALF:], "fp32")


def test_compiled_blocks_train_the_same(digits, tmp_path, reference):
    """Under activation checkpointing too; ZeRO-3 says that it does not compile."""
    extra = (HALF_WAY, "--engine.compile=true", "--engine.activation_checkpointing=true")
    names = ["zero2_fp32", "zero3_fp32", "fsdp2_fp32", "fsdp2_bf16", "flat_fp32", "flat_bf16"]
    jobs = [Job(name, (*setting(name), *extra)) for name in names]
    found = run_on_ranks(
        2, train_on_ranks, digits, tmp_path, jobs, timeout_seconds=TIMEOUT_SECONDS
    )[0]
    for name in names:
        assert_same(found[name], reference[:HALF], name.partition("_")[2])
