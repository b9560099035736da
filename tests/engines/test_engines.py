"""All engines train the same network: losses, gradient norms and checkpoints agree."""

from pathlib import Path

import pytest
import torch

from dtr_scale.engines.world import World, join_world
from tests.ranks import run_on_ranks
from tests.runs import SINGLE, demo_experiment, train_on

STEPS, HALF = 20, 10
COMMON = (
    "--train.global_batch_size=32",
    "--train.micro_batch_size=8",
    "--train.grad_clip=0.5",
    f"--train.max_steps={STEPS}",
)
ZERO = {
    f"zero{stage}_{precision}": (f"--engine.zero_stage={stage}", f"--engine.precision={precision}")
    for stage in (0, 1, 2)
    for precision in ("fp32", "bf16")
}
LONE = World(0, 0, 1, torch.device("cpu"))


def two_ranks(digits: Path, place: Path) -> dict[str, list[dict[str, float]]]:
    """Runs on each rank: every ZeRO setting from the start, and two that hand over half-way."""
    world = join_world(needs_process_group=True)
    records = {
        name: train_on(world, demo_experiment(digits, place / name, *COMMON, *setting))
        for name, setting in ZERO.items()
    }
    half = (*COMMON, *ZERO["zero1_fp32"], f"--train.max_steps={HALF}")
    train_on(world, demo_experiment(digits, place / "zero1_then_single", *half))
    onward = (*COMMON, *ZERO["zero2_fp32"])
    experiment = demo_experiment(digits, place / "single_then_zero2", *onward)
    records["single_then_zero2"] = train_on(world, experiment, resume=True)
    world.leave()
    return records


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Records of all runs by name; the single process comes first and last."""
    place = tmp_path_factory.mktemp("runs")
    single = (*COMMON, *SINGLE)
    reference = train_on(LONE, demo_experiment(digits, place / "single", *single))
    half = demo_experiment(
        digits, place / "single_then_zero2", *single, f"--train.max_steps={HALF}"
    )
    train_on(LONE, half)
    first, second = run_on_ranks(2, two_ranks, digits, place)
    assert {name: losses(records) for name, records in first.items()} == {
        name: losses(records) for name, records in second.items()
    }
    onward = demo_experiment(digits, place / "zero1_then_single", *single)
    handed_over = train_on(LONE, onward, resume=True)
    return {"single": reference, "zero1_then_single": handed_over, **first}


def losses(records):
    return [record["loss"] for record in records]


@pytest.mark.parametrize("name", ZERO)
def test_two_ranks_agree_with_one_process(runs, name):
    tolerance = 1e-5 if name.endswith("fp32") else 2e-2
    for key in ("loss", "objective", "mse", "vb", "grad_norm"):
        found = [record[key] for record in runs[name]]
        expected = [record[key] for record in runs["single"]]
        scale = max(abs(value) for value in expected)
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance * scale), key


@pytest.mark.parametrize("name", ["zero1_then_single", "single_then_zero2"])
def test_a_checkpoint_goes_on_in_another_engine_and_world(runs, name):
    assert losses(runs[name]) == pytest.approx(losses(runs["single"])[HALF:], rel=1e-5)
    assert [record["step"] for record in runs[name]] == list(range(HALF + 1, STEPS + 1))
