"""All engines train the same network: losses, gradient norms, samples and checkpoints agree.

One of each kind; `test_matrix.py` has every engine, world size and pair of them.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dtr_scale.engines.world import World, join_world
from dtr_scale.errors import ConfigError, EngineError
from dtr_scale.evaluation.batchwise import BatchMeasure
from dtr_scale.jobs.build import build_network, build_trainer
from dtr_scale.jobs.sampling import sampling_settings
from dtr_scale.tracking.journal import Record
from dtr_scale.train.evaluate import PeriodicEvaluation
from dtr_scale.train.rounds import Rounds
from tests.support.engine_jobs import (
    HALF,
    HALF_WAY,
    LONE,
    STEPS,
    Job,
    assert_same,
    handed_over,
    losses,
    setting,
    train_all,
)
from tests.support.ranks import run_on_ranks
from tests.support.runs import demo_experiment

pytestmark = pytest.mark.slow

CHECKPOINTING = "--engine.activation_checkpointing=true"
EXPERTS = ("--model.num_experts=3",)
EVALUATING = (
    "--evaluation.every_steps=5",
    "--evaluation.num_samples=5",
    "--evaluation.batch_size=4",
    "--evaluation.loss_samples=8",
    "--evaluation.num_sampling_steps=2",
)
OFFLOADED = {
    "zero_optimization": {
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
        "sub_group_size": 10_000,
    },
}
FP32 = [f"{engine}_fp32" for engine in ("zero1", "zero3", "fsdp2", "flat")]
BF16 = ["zero1_bf16", "zero3_bf16", "fsdp2_bf16", "flat_bf16"]
BEGUN_ON_ONE = "single_fp32_then_zero3_fp32"
ENDED_ON_ONE = "fsdp2_fp32_then_single_fp32"


# 32 rows on three ranks are 11, 11 and 10; the only class is one row, on one rank.
ODD = ("--train.global_batch_size=24", "--model.conditioning=none", "--evaluation.cfg_scale=1")


def jobs_of_two_ranks(place: Path) -> list[Job]:
    section = place / "deepspeed.json"
    section.write_text(json.dumps(OFFLOADED))
    jobs = [Job(name, setting(name)) for name in FP32 + BF16]
    for engine in ("zero3", "fsdp2", "flat"):
        fp32, bf16 = setting(f"{engine}_fp32"), setting(f"{engine}_bf16")
        jobs += handed_over(f"{engine}_bf16", f"{engine}_bf16")
        jobs += [
            Job(f"{engine}_evaluating", (*bf16, HALF_WAY, *EVALUATING), evaluating=True),
            Job(f"{engine}_experts", (*fp32, HALF_WAY, *EXPERTS, *EVALUATING), evaluating=True),
            Job(f"{engine}_checkpointing", (*fp32, HALF_WAY, CHECKPOINTING)),
        ]
    dropped = (*setting("fsdp2_fp32"), HALF_WAY, "--engine.reshard_after_forward=true")
    offloaded = (*setting("zero3_bf16"), HALF_WAY, f"--engine.deepspeed_config={section}")
    jobs += [Job("fsdp2_dropped", dropped), Job("zero3_offloaded", offloaded)]
    jobs.append(Job(BEGUN_ON_ONE, setting("zero3_fp32"), resume=True))
    jobs.append(Job(f"{ENDED_ON_ONE}_begun", (*setting("fsdp2_fp32"), HALF_WAY), ENDED_ON_ONE))
    return jobs


def two_ranks(
    digits: Path, place: Path, jobs: list[Job]
) -> tuple[dict[str, list[Record]], list[list[np.ndarray]], list[str]]:
    """Runs on each rank: all jobs, samples of what one process trained, and what is refused."""
    world = join_world(needs_process_group=True)
    records = train_all(digits, place, jobs, world)
    pictures = [draw(world, digits, place, engine) for engine in ("zero3", "fsdp2")]
    refusals = [refusal(world, digits, place, section) for section in REFUSED]
    world.leave()
    return records, pictures, refusals


REFUSED = (
    {"zero_optimization": {"reduce_bucket_sz": 1}},
    {"data_types": {"grad_accum_dtype": "fp32"}},  # another optimizer, which hides its weights
)


def refusal(world: World, digits: Path, place: Path, section: dict[str, Any]) -> str:
    """Return the error that ZeRO-1 raises with a section of DeepSpeed's settings."""
    overrides = (*setting("zero1_bf16"), f"--engine.deepspeed_config={json.dumps(section)}")
    with pytest.raises((ConfigError, EngineError)) as caught:
        build_trainer(demo_experiment(digits, place, *overrides), world)
    return f"{caught.type.__name__}: {caught.value}"


def draw(world: World, digits: Path, place: Path, engine: str) -> list[np.ndarray]:
    """Return 5 samples and 1 of the run "single", drawn as in training; none but on rank 0."""
    overrides = (*setting(f"{engine}_fp32"), "--evaluation.num_sampling_steps=4")
    experiment = demo_experiment(digits, place / "single_fp32", *overrides)
    trainer = build_trainer(experiment, world)
    assert trainer.resume()
    folder = place / f"{engine}_samples"
    folder.mkdir(exist_ok=True)
    for num_samples in (5, 1):
        evaluate = PeriodicEvaluation(
            rounds=Rounds(world, lambda: None),
            engine=trainer.engine,
            ema=trainer.ema,
            settings=sampling_settings(experiment),
            num_samples=num_samples,
            batch_size=2,
            conditions=None,
            null_condition=None,
            measure=BatchMeasure(decode=None),
            held_out_loss=None,
            manifest=lambda step: {"step": step},
            run_dir=place if world.is_main else None,
            samples_dir=folder if world.is_main else None,
        )
        evaluate(num_samples)
    files = sorted(folder.iterdir(), reverse=True) if world.is_main else []
    return [np.load(path)["latents"] for path in files]


class Runs(NamedTuple):
    records: dict[str, list[Record]]
    pictures: dict[str, list[np.ndarray]]
    refusals: list[str]


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory) -> Runs:
    """All runs of one and two ranks; the single process comes first and last."""
    place = tmp_path_factory.mktemp("runs")
    single = setting("single_fp32")
    first = [Job("single_fp32", single), Job("experts", (*single, HALF_WAY, *EXPERTS))]
    first.append(Job(f"{BEGUN_ON_ONE}_begun", (*single, HALF_WAY), BEGUN_ON_ONE))
    records = train_all(digits, place, first, LONE)
    pictures = {"single": draw(LONE, digits, place, "single")}
    jobs = jobs_of_two_ranks(place)
    (found, drawn, refusals), (same, *_) = run_on_ranks(2, two_ranks, digits, place, jobs)
    assert {name: losses(run) for name, run in found.items()} == {
        name: losses(run) for name, run in same.items()
    }
    last = [Job(ENDED_ON_ONE, single, resume=True)]
    records |= found | train_all(digits, place, last, LONE)
    pictures |= dict(zip(("zero3", "fsdp2"), drawn, strict=True))
    return Runs(records, pictures, refusals)


@pytest.mark.parametrize("name", FP32 + BF16)
def test_two_ranks_agree_with_one_process(runs, name):
    assert_same(runs.records[name], runs.records["single_fp32"], name.partition("_")[2])


@pytest.mark.parametrize("engine", ["zero3", "fsdp2", "flat"])
def test_activation_checkpointing_changes_nothing(runs, engine):
    expected = losses(runs.records[f"{engine}_fp32"])[:HALF]
    assert losses(runs.records[f"{engine}_checkpointing"]) == expected


def test_weights_dropped_after_forward_change_nothing(runs):
    assert losses(runs.records["fsdp2_dropped"]) == losses(runs.records["fsdp2_fp32"])[:HALF]


def test_offloading_by_the_users_own_section_changes_nothing(runs):
    expected = losses(runs.records["zero3_bf16"])[:HALF]
    assert losses(runs.records["zero3_offloaded"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2", "flat"])
def test_experts_train_and_sample_on_ranks_that_share_their_weights(runs, engine):
    assert_same(runs.records[f"{engine}_experts"], runs.records["experts"], "fp32")


@pytest.mark.parametrize("name", [BEGUN_ON_ONE, ENDED_ON_ONE])
def test_a_checkpoint_goes_on_in_another_engine_and_world(runs, name):
    assert_same(runs.records[name], runs.records["single_fp32"][HALF:], "fp32")
    assert [record["step"] for record in runs.records[name]] == list(range(HALF + 1, STEPS + 1))


@pytest.mark.parametrize("name", ["zero3_bf16", "fsdp2_bf16", "flat_bf16"])
def test_the_same_engine_resumes_to_the_last_bit(runs, name):
    resumed = runs.records[f"{name}_then_{name}"]
    assert losses(resumed) == losses(runs.records[name])[HALF:]


@pytest.mark.parametrize("engine", ["zero3", "fsdp2", "flat"])
def test_sampling_with_the_averaged_weights_leaves_training_as_it_was(runs, engine):
    expected = losses(runs.records[f"{engine}_bf16"])[:HALF]
    assert losses(runs.records[f"{engine}_evaluating"]) == expected


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_ranks_draw_the_samples_of_one_process_however_few(runs, engine):
    assert [len(drawn) for drawn in runs.pictures[engine]] == [5, 1]
    assert np.abs(runs.pictures["single"][0]).max() > 0.1
    for found, expected in zip(runs.pictures[engine], runs.pictures["single"], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_what_deepspeed_does_not_know_or_changes_too_much_is_refused(runs):
    unknown, elsewhere = runs.refusals
    assert "ConfigError: DeepSpeed 0.19" in unknown
    assert "does not accept reduce_bucket_sz in engine.deepspeed_config: Extra inputs" in unknown
    assert "EngineError: DeepSpeed 0.19" in elsewhere
    assert "does not keep its fp32 weights where this trainer reads them" in elsewhere


class Part(NamedTuple):
    name: str
    offset: int
    numel: int
    as_initialised: bool


def three_ranks(
    digits: Path, place: Path, names: list[str]
) -> tuple[list[Record], dict[str, list[Part]]]:
    """Runs on each rank: a training on uneven shards, and what each engine gives a rank."""
    world = join_world(needs_process_group=True)
    job = Job("fsdp2", (*setting("fsdp2_fp32"), *ODD, HALF_WAY))
    records = train_all(digits, place, [job], world)["fsdp2"]
    parts = {name: parts_of(world, digits, place / name, name) for name in names}
    world.leave()
    return records, parts


def parts_of(world: World, digits: Path, place: Path, engine: str) -> list[Part]:
    experiment = demo_experiment(digits, place, *setting(engine), *ODD)
    initial = {n: p.detach().view(-1) for n, p in build_network(experiment).named_parameters()}
    parts = []
    for name, piece in build_trainer(experiment, world).engine.masters().items():
        whole, numel = initial[name], piece.data.numel()
        same = torch.equal(piece.data, whole[piece.offset : piece.offset + numel])
        parts.append(Part(name, piece.offset, numel, same))
    return parts


def assert_equal_parts(digits: Path, ranks: list[list[Part]], copies: int = 1) -> None:
    """The ranks hold every fp32 weight `copies` times, as initialised, and about equally many."""
    experiment = demo_experiment(digits, Path(), *setting("single_fp32"), *ODD)
    sizes = {name: p.numel() for name, p in build_network(experiment).named_parameters()}
    total = copies * sum(sizes.values())
    held: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for parts in ranks:
        assert sum(part.numel for part in parts) == pytest.approx(total / len(ranks), rel=0.1)
        for part in parts:
            assert part.as_initialised, part
            held[part.name].append((part.offset, part.numel))
    assert sum(numel for places in held.values() for _, numel in places) == total
    for name, numel in sizes.items():
        end = 0
        for offset, length in sorted(set(held[name])):
            assert offset == end, name
            end += length
        assert end == numel, name


def test_uneven_shards_on_three_ranks(digits, tmp_path):
    names = ["zero1_bf16", "zero3_bf16", "fsdp2_bf16", "flat_bf16"]
    ranks = run_on_ranks(3, three_ranks, digits, tmp_path, names)
    for name in names:
        assert_equal_parts(digits, [parts[name] for _, parts in ranks])
    single = (*setting("single_fp32"), *ODD)
    jobs = [Job("single", single), Job("fsdp2", single, resume=True)]
    alone = train_all(digits, tmp_path, jobs, LONE)
    for records, _ in ranks:
        assert_same(records + alone["fsdp2"], alone["single"], "fp32")


def four_ranks(digits: Path, place: Path) -> tuple[list[Record], list[Part]]:
    """Runs on each rank: two copies of the weights on two ranks each, half a training."""
    world = join_world(needs_process_group=True)
    job = Job("hsdp", (*setting("hsdp_fp32"), HALF_WAY))
    records = train_all(digits, place, [job], world)["hsdp"]
    parts = parts_of(world, digits, place / "parts", "hsdp_bf16")
    world.leave()
    return records, parts


def test_two_copies_of_the_weights_on_four_ranks(runs, digits, tmp_path):
    ranks = run_on_ranks(4, four_ranks, digits, tmp_path)
    assert_equal_parts(digits, [parts for _, parts in ranks], copies=2)
    rest = train_all(digits, tmp_path, [Job("hsdp", setting("single_fp32"), resume=True)], LONE)
    for records, _ in ranks:
        assert_same(records + rest["hsdp"], runs.records["single_fp32"], "fp32")
