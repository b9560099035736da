"""Micro-steps that are repeated, not computed anew: the same training, bit for bit.

Here the operations of a CPU are recorded and repeated. `tests/gpu_stub` captures CUDA graphs that
compute nothing, `tests/gpu` those of a GPU.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtr_scale.config.load import load_experiment
from dtr_scale.engines.graphs import WARM_UP_CALLS
from dtr_scale.engines.world import World, join_world
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.build import build_trainer
from dtr_scale.tracking.journal import TIMINGS
from tests.support.engine_jobs import LONE
from tests.support.ranks import run_on_ranks
from tests.support.repeated import CpuGraphs
from tests.support.runs import ROOT, demo_experiment, run_trainer

STEPS = WARM_UP_CALLS + 4
FLAT = ("--engine.type=flat", "--train.global_batch_size=16", f"--train.max_steps={STEPS}")


def train(world: World, digits: Path, place: Path, *overrides: str, graphs: bool) -> Any:
    """Return the figures and the state of a training, and how many micro-steps were recorded."""
    trainer = build_trainer(demo_experiment(digits, place, *FLAT, *overrides), world)
    engine: Any = trainer.engine
    repeated = CpuGraphs()
    engine._graphs = repeated if graphs else None
    trainer.resume()
    records = run_trainer(trainer, evaluate=lambda step: None)
    figures = [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]
    state = {key: piece.data.numpy().copy() for key, piece in trainer.state.pieces().items()}
    trainer.checkpoints.close()
    return figures, state, len(repeated._recorded)


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for key, data in expected[1].items():
        assert np.array_equal(found[1][key], data), key


@pytest.mark.parametrize(
    ("precision", "micro_steps", "others"),
    [
        ("fp32", 1, ("--engine.activation_checkpointing=true",)),
        ("bf16", 2, ("--train.grad_clip=0.5",)),
        ("fp32", 4, ("--train.freeze=t_embedder.*", "--objective.type=vanilla")),
    ],
)
def test_repeated_micro_steps_train_bit_for_bit_as_computed_ones(
    digits, tmp_path, precision, micro_steps, others
):
    overrides = (
        f"--train.micro_batch_size={16 // micro_steps}", f"--engine.precision={precision}", *others,
    )  # fmt: skip
    expected = train(LONE, digits, tmp_path / "computed", *overrides, graphs=False)
    found = train(LONE, digits, tmp_path / "repeated", *overrides, graphs=True)
    assert_same(found, expected)
    # The first of a step, and those that follow it.
    assert found[2] == min(micro_steps, 2)


def test_a_run_goes_on_bit_for_bit(digits, tmp_path):
    micro = "--train.micro_batch_size=8"
    expected = train(LONE, digits, tmp_path / "whole", micro, graphs=False)
    half = f"--train.max_steps={STEPS // 2}"
    begun = train(LONE, digits, tmp_path / "parts", micro, half, graphs=True)
    figures, *found = train(LONE, digits, tmp_path / "parts", micro, graphs=True)
    assert_same((begun[0] + figures, *found), expected)


def trainings(digits: Path, place: Path) -> list[Any]:
    """Runs on a rank: the same training, computed and repeated."""
    world = join_world(needs_process_group=True)
    micro = "--train.micro_batch_size=4"
    found = [
        train(world, digits, place / str(graphs), micro, graphs=graphs) for graphs in (False, True)
    ]
    world.leave()
    return found


@pytest.mark.slow
def test_ranks_exchange_what_repeated_micro_steps_have_added_up(digits, tmp_path):
    for expected, found in run_on_ranks(2, trainings, digits, tmp_path):
        assert_same(found, expected)
        assert found[2] == 2


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["--engine.type=single", "--engine.precision=fp32"],
            r'"single".*set engine\.cuda_graphs=false, or engine\.type=flat',
        ),
        (["--engine.type=fsdp2"], "fsdp2"),
        (["--engine.type=deepspeed", "--engine.zero_stage=3"], "deepspeed"),
        (["--engine.type=flat", "--engine.device=cpu"], "engine.device"),
        (["--engine.type=flat", "--model.num_experts=2"], "its parts of a batch differ"),
        (["--engine.type=flat", "--model.routing.type=max_roaming"], "change with the step"),
    ],
)
def test_what_cannot_be_a_graph_is_refused_by_name(overrides, told):
    config = ROOT / "configs" / "dit_l_dtr_antuw.json"
    with pytest.raises(ConfigError, match=rf"engine\.cuda_graphs = true.*{told}"):
        load_experiment(config, ["--engine.cuda_graphs=true", *overrides])
    load_experiment(config, overrides)  # "auto" asks for nothing


def test_a_cpu_has_no_graphs(digits, tmp_path):
    experiment = demo_experiment(digits, tmp_path, *FLAT, "--engine.cuda_graphs=true")
    with pytest.raises(ConfigError, match=r"none on this device \(cpu\)"):
        build_trainer(experiment, LONE)
