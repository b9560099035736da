"""Parameters that are not trained, under every engine: the rest trains, saves and goes on."""

from pathlib import Path

import pytest
import torch

from dtr_scale.engines.freeze import freeze
from dtr_scale.engines.world import World, join_world
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.build import build_trainer
from tests.support.engine_jobs import assert_same, setting
from tests.support.ranks import run_on_ranks
from tests.support.runs import demo_experiment, run_trainer
from tests.support.weights import CONFIG, random_network

PATTERNS = "x_embedder.*,y_embedder.*,blocks.0.*,blocks.1.attn.*"
FROZEN = tuple(pattern.rstrip("*") for pattern in PATTERNS.split(","))
# Each goes on where the one before it has stopped.
RELAY = ("single_fp32", "zero1_fp32", "zero3_fp32", "fsdp2_fp32", "flat_fp32", "zero2_fp32",
         "zero0_fp32", "single_bf16", "zero1_bf16", "zero3_bf16", "fsdp2_bf16",
         "flat_bf16")  # fmt: skip
DECAYED = ("--train.weight_decay=0.1", "--train.decayed=matrices", f"--train.freeze={PATTERNS}")


def masters(trainer):
    pieces = trainer.state.pieces()
    kept = ("master/", "ema/", "exp_avg/")
    return {key: piece.data.clone() for key, piece in pieces.items() if key.startswith(kept)}


def train_frozen(digits: Path, folder: Path, name: str, world: World, *, stop: int, resume: bool):
    """Train to a step under an engine, check what has moved, and return the records."""
    steps = f"--train.max_steps={stop}"
    experiment = demo_experiment(digits, folder, *setting(name), *DECAYED, steps)
    trainer = build_trainer(experiment, world)
    if resume:
        assert trainer.resume() is not None
    before = masters(trainer)
    records = run_trainer(trainer)
    assert trainer.engine.optimizer_step == stop, name
    for key, value in masters(trainer).items():
        kind, _, parameter = key.partition("/")
        if parameter.startswith(FROZEN):
            assert torch.equal(value, before[key]), (name, key)
        # From zeros: the first gradients of a DiT go no further than to its last layer.
        elif kind == "master" and parameter.startswith("final_layer.linear"):
            assert not torch.equal(value, before[key]), (name, key)
    return records


def relay(digits: Path, place: Path) -> list:
    """Runs on each rank: every engine from the start, and all of them one after the other."""
    world = join_world(needs_process_group=True)
    records = []
    for name in RELAY if world.world_size == 1 else [n for n in RELAY if "single" not in n]:
        records.append(
            (name, train_frozen(digits, place / name, name, world, stop=3, resume=False))
        )
        stop = 2 * len(records)
        train_frozen(digits, place / "relay", name, world, stop=stop, resume=stop > 2)
    world.leave()
    return records


def check_relay(ranks, digits, place):
    for records in run_on_ranks(ranks, relay, digits, place, timeout_seconds=280):
        expected = records[0][1]
        for name, found in records:
            assert_same(found, expected, name.partition("_")[2])


def test_every_engine_trains_around_what_is_frozen(digits, tmp_path):
    check_relay(1, digits, tmp_path)


@pytest.mark.slow
def test_two_ranks_train_around_what_is_frozen(digits, tmp_path):
    check_relay(2, digits, tmp_path)


def test_patterns_must_fit_and_leave_something():
    network = random_network(CONFIG)
    with pytest.raises(ConfigError, match=r"train.freeze: 'block.\*' fits no parameter"):
        freeze(network, ["blocks.0.*", "block.*"])
    with pytest.raises(ConfigError, match="fits every parameter"):
        freeze(network, ["*"])
    assert all(parameter.requires_grad for parameter in network.parameters())
    freeze(network, ["blocks.*.attn.*", "final_layer.linear.bias"])
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 3 * 4 + 1
