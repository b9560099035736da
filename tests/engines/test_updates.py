"""What an update depends on is the same under every engine: its rate, Adam, whether it is made."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World, join_world
from dtr_scale.jobs import train as job
from dtr_scale.jobs.build import build_trainer
from dtr_scale.signals import LeaveRequest
from dtr_scale.tracking.journal import Record
from dtr_scale.train import guard
from dtr_scale.train.trainer import Trainer
from tests.support.engine_jobs import (
    HALF_WAY,
    LONE,
    Job,
    assert_same,
    setting,
    train_all,
    train_on_ranks,
)
from tests.support.poison import poison
from tests.support.ranks import run_on_ranks
from tests.support.runs import TIMINGS, demo_experiment, journal, status

pytestmark = pytest.mark.slow

ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp2", "flat")
# Large enough that the rate, the betas and what is decayed show in the losses.
SETTINGS = (
    HALF_WAY, "--train.lr=5e-3", "--train.warmup_steps=3", "--train.schedule=cosine",
    "--train.betas=[0.8, 0.95]", "--train.eps=1e-6", "--train.weight_decay=5",
    "--train.decayed=matrices",
)  # fmt: skip
FORGOTTEN = {
    "the schedule": ("--train.schedule=constant",),
    "the warm-up": ("--train.warmup_steps=0",),
    "the betas": ("--train.betas=[0.9, 0.999]",),
    "what is decayed": ("--train.decayed=all",),
}


def test_two_ranks_make_the_updates_of_one_process(digits, tmp_path):
    single = (*setting("single_fp32"), *SETTINGS)
    alone = train_all(
        digits,
        tmp_path,
        [Job("single", single)] + [Job(k, (*single, *v)) for k, v in FORGOTTEN.items()],
        LONE,
    )
    expected = alone.pop("single")
    for what, records in alone.items():
        with pytest.raises(AssertionError):  # this test would notice
            assert_same(records, expected, "fp32")
        assert len(records) == len(expected), what
    jobs = [Job(engine, (*setting(f"{engine}_fp32"), *SETTINGS)) for engine in ENGINES]
    for rank in run_on_ranks(2, train_on_ranks, digits, tmp_path, jobs):
        for engine, records in rank.items():
            assert_same(records, expected, "fp32")
            assert [r["lr"] for r in records] == [r["lr"] for r in expected], engine


BROKEN = {
    1: ("zero1_bf16", "flat_fp32"),
    2: ("zero0_fp32", "zero1_bf16", "zero2_fp32", "zero3_bf16", "fsdp2_bf16", "flat_bf16"),
}
# Step 3 has no gradient, step 6 a spike; with clipping, which makes nan of all.
SKIPPING = (
    "--train.max_steps=8", "--train.spike_factor=100", "--train.ema_sigma_rel=[0.1]",
    "--train.weight_decay=0.1", "--train.lr=1e-3",
)  # fmt: skip
GOING_BACK = ("--train.rollback_after=2", "--checkpoint.every_steps=2")


class Run(NamedTuple):
    records: list[Record]
    unchanged: list[int]
    """Steps after which this rank's whole state was what it had been."""


def run_broken(
    world: World, digits: Path, place: Path, name: str, *extra: str, back: bool = False
) -> Run:
    """Train with the gradients of one rank broken, or until the run goes back."""
    guard._FEWEST = 2
    overrides = (*setting(name), *SKIPPING, *extra)
    trainer = build_trainer(demo_experiment(digits, place, *overrides), world)
    if back:
        poison(trainer, lambda step, salt: salt == 0 and step >= 5)
    elif world.is_main:  # its share alone: all ranks must come to the same verdict
        poison(trainer, lambda step, salt: step == 3)
        poison(trainer, lambda step, salt: step == 6, factor=1e5)
    trainer.resume()

    def state() -> dict[str, torch.Tensor]:
        found = {key: piece.data.clone() for key, piece in trainer.state.pieces().items()}
        return found | {"step": torch.tensor(trainer.engine.optimizer_step)}

    records, unchanged, last = [], [], state()

    def log(record: Record) -> None:
        nonlocal last
        now = state()
        if all(torch.equal(now[key], last[key]) for key in now):
            unchanged.append(int(record["step"]))
        last = now
        told = {k: v for k, v in record.items() if k not in TIMINGS}
        if record["step"] in unchanged:
            # What one rank of several is poisoned with is not what a lone one is.
            told |= {"objective": 0.0, "grad_norm": 0.0}
        records.append(told)

    with trainer.loader:
        trainer.run(LeaveRequest(), log=log)
    return Run(records, unchanged)


def broken_on_ranks(digits: Path, place: Path) -> dict[str, tuple[Run, Run, Run]]:
    """Runs on each rank: through, in two parts, and back, under every engine."""
    world = join_world(needs_process_group=True)
    found = {}
    for name in BROKEN[world.world_size]:
        through = run_broken(world, digits, place / name, name)
        parts = [
            # The first ends with the skipped step.
            run_broken(world, digits, place / f"{name}_parts", name, f"--train.max_steps={end}")
            for end in (3, 8)
        ]
        resumed = Run(parts[0].records + parts[1].records, parts[0].unchanged + parts[1].unchanged)
        back = run_broken(world, digits, place / f"{name}_back", name, *GOING_BACK, back=True)
        found[name] = through, resumed, back
    world.leave()
    return found


@pytest.mark.parametrize("world_size", BROKEN)
def test_an_update_is_skipped_by_all_ranks_alike(digits, tmp_path, world_size, monkeypatch):
    monkeypatch.setattr(guard, "_FEWEST", 2)
    single = "single_fp32"
    expected = run_broken(LONE, digits, tmp_path / "single", single)
    went_back = run_broken(LONE, digits, tmp_path / "back", single, *GOING_BACK, back=True)
    assert expected.unchanged == [3, 6]
    assert [record["step"] for record in went_back.records] == [*range(1, 7), *range(5, 9)]
    for rank in run_on_ranks(world_size, broken_on_ranks, digits, tmp_path):
        for name, (through, resumed, back) in rank.items():
            precision = name.partition("_")[2]
            assert through.unchanged == resumed.unchanged == [3, 6], name
            assert resumed.records == through.records, name
            assert [r["skipped_steps"] for r in through.records] == [0, 0, 1, 1, 1, 2, 2, 2], name
            assert_same(through.records, expected.records, precision)
            assert back.unchanged == [5, 6], name
            assert_same(back.records, went_back.records, precision)


def job_that_goes_back(digits: Path, place: Path) -> int:
    """Runs on each rank: a whole job whose gradients break until it has gone back."""

    def build(experiment: Experiment, world: World) -> Trainer:
        trainer = build_trainer(experiment, world)
        poison(trainer, lambda step, salt: salt == 0 and step >= 5)
        return trainer

    job.build_trainer = build
    overrides = (*setting("zero1_bf16"), *SKIPPING, *GOING_BACK, "--data.num_workers=1")
    return job.train_experiment(demo_experiment(digits, place, *overrides))


def test_the_ranks_of_a_job_go_back_together(digits, tmp_path):
    assert run_on_ranks(2, job_that_goes_back, digits, tmp_path) == [0, 0]
    assert [record["step"] for record in journal(tmp_path)] == list(range(1, 9))
    assert [record["rollbacks"] for record in journal(tmp_path)] == [0] * 4 + [1] * 4
    assert status(tmp_path)["outcome"] == "finished"
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2  # rank 0 tells them
