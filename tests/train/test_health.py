"""What a journal tells of devices and ranks."""

import time
from pathlib import Path
from typing import Any

import torch

from dtr_scale.engines.world import join_world
from dtr_scale.jobs.build import build_trainer
from dtr_scale.logs import setup_logging
from dtr_scale.train.clock import RankTimes
from dtr_scale.train.health import Health, SlowRank
from tests.support.ranks import run_on_ranks
from tests.support.runs import demo_experiment, run_trainer

CPU = torch.device("cpu")
SLOW = {"slowest_rank": 2, "slowest_rank_seconds": 0.9, "median_rank_seconds": 0.3}


def test_throughput_is_told_as_arithmetic_of_a_device(monkeypatch):
    now = iter([(1000.0, 10.0), (1900.0, 13.0), (1900.0, 14.0)])
    monkeypatch.setattr(Health, "_read_energy", lambda self: next(now))
    health = Health(
        device=CPU, world_size=4, flops_per_sample=2e12, peak_flops=500e12, tokens_per_sample=256
    )
    record = health.added_to({"step": 1, "samples_per_second": 400.0})
    assert record.pop("memory_gb") > 0
    assert record == {
        "step": 1, "samples_per_second": 400.0, "tokens_per_second": 102_400.0,
        "tflops": 200.0, "mfu": 0.4, "power_watts": 300.0,
    }  # fmt: skip
    assert health.added_to({"samples_per_second": 1.0})["power_watts"] == 0


def test_what_is_not_known_is_not_told():
    unknown: Any = {"flops_per_sample": None, "peak_flops": 1e12, "tokens_per_sample": 0}
    health = Health(device=CPU, world_size=1, **unknown)
    assert set(health.added_to({"samples_per_second": 1.0})) == {"samples_per_second", "memory_gb"}


def test_rank_times_are_means_since_the_last_reading():
    times = RankTimes()
    assert times.read() == {}
    times.add([0.0, 0.0, 0.0])  # a GPU's first step: not known yet
    times.add([1.0, 2.0, 4.0])
    times.add([2.0, 2.0, 2.0])
    expected = {"slowest_rank": 2, "slowest_rank_seconds": 3.0, "median_rank_seconds": 2.0}
    assert times.read() == expected
    assert times.read() == {}
    times.add([])  # a world of one
    assert times.read() == {}


def test_a_slow_rank_is_named_once_and_again_after_it_was_well(capsys):
    setup_logging(0)
    watch = SlowRank(["a", "a", "node7", "node7"])
    for record in (SLOW, SLOW, SLOW):
        watch.look(record)
    watch.look({"step": 4})  # a world of one
    watch.look(SLOW | {"slowest_rank_seconds": 0.44})
    watch.look(SLOW)  # one record may be chance
    assert capsys.readouterr().err.count("rank 2 on node7 takes 0.9 s") == 1
    watch.look(SLOW)
    assert "half of the ranks at most 0.3 s" in capsys.readouterr().err


def records_with_a_slow_rank(digits: Path, place: Path, kind: str) -> list[dict[str, float]]:
    """Runs on a rank: train while the forwards of rank 1 are slow."""
    world = join_world(needs_process_group=True)
    sizes = ("--train.global_batch_size=16", "--train.micro_batch_size=4", "--train.max_steps=4")
    overrides = (f"--engine.type={kind}", "--engine.precision=fp32", "--train.log_every=2")
    trainer = build_trainer(demo_experiment(digits, place, *sizes, *overrides), world)
    if world.rank == 1:
        engine: Any = trainer.engine
        forward = engine.forward

        def slow_forward(*args: Any) -> torch.Tensor:
            time.sleep(0.2)
            return forward(*args)

        engine.forward = slow_forward
    records = run_trainer(trainer)
    world.leave()
    return records


def test_the_rank_that_all_wait_for_is_told_in_every_record(digits, tmp_path):
    found = run_on_ranks(2, records_with_a_slow_rank, digits, tmp_path, "deepspeed")
    for record in found[0]:
        assert record["slowest_rank"] == 1
        # Two micro-steps; the other rank takes as long for a step, but not of its own.
        assert 0.4 <= record["slowest_rank_seconds"] < record["step_seconds"] * 1.5
        assert record["median_rank_seconds"] < 0.3 < record["step_seconds"]
