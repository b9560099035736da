"""All engines train the same network: losses, gradient norms and checkpoints agree."""

from pathlib import Path

import pytest
import torch

from dtr_scale.engines.world import World, join_world
from dtr_scale.errors import DataError, EngineError
from dtr_scale.train.build import build_network, build_trainer
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
    evaluating = (
        *COMMON, *ZERO["zero1_bf16"], "--evaluation.every_steps=5", "--evaluation.num_samples=5",
        "--evaluation.num_sampling_steps=2",
    )  # fmt: skip
    experiment = demo_experiment(digits, place / "evaluating", *evaluating)
    records["zero1_bf16_evaluating"] = train_on(world, experiment, evaluating=True)
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


def masters_start_in_fp32(digits: Path, place: Path) -> bool:
    """Tell whether a bf16 engine's masters are what the network was initialised with."""
    world = join_world(needs_process_group=True)
    experiment = demo_experiment(digits, place, *COMMON, *ZERO["zero1_bf16"])
    initial = dict(build_network(experiment).named_parameters())
    parts = build_trainer(experiment, world).engine.fragments()
    world.leave()
    return all(
        torch.equal(
            part.master,
            initial[part.name].detach().view(-1)[part.offset : part.offset + len(part.master)],
        )
        for part in parts
    )


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


def test_sampling_with_the_averaged_weights_leaves_training_as_it_was(runs):
    assert losses(runs["zero1_bf16_evaluating"]) == losses(runs["zero1_bf16"])


def test_masters_are_not_rounded_to_bf16_at_the_start(digits, tmp_path):
    assert run_on_ranks(2, masters_start_in_fp32, digits, tmp_path) == [True, True]


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
