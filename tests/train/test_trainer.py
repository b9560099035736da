"""A step: what it adds to the averages, what it makes of broken losses, how it sums."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtr_scale.engines.world import World, join_world
from dtr_scale.errors import DivergenceError
from dtr_scale.jobs.build import build_trainer
from dtr_scale.signals import LeaveRequest
from dtr_scale.train.ema import power_gamma
from tests.support.engine_jobs import setting
from tests.support.ranks import run_on_ranks
from tests.support.runs import SINGLE, demo_experiment, train

ALONE = World(0, 0, 1, torch.device("cpu"))
AT_ONCE = ("--train.rollback_after=1", "--train.max_rollbacks=0")
"""A first update that would be skipped ends the run."""
STEPS = ("--train.global_batch_size=32", "--train.micro_batch_size=32", "--train.max_steps=3")


def test_the_averages_hold_every_step_with_its_own_weight(digits, tmp_path):
    averages = ("--train.ema_decay=0.5", "--train.ema_sigma_rel=[0.1]")
    trainer = build_trainer(demo_experiment(digits, tmp_path, *SINGLE, *STEPS, *averages), ALONE)
    weights = trainer.engine.network.state_dict()
    name = "final_layer.linear.weight"
    path = [weights[name].clone()]
    with trainer.loader:
        trainer.run(
            LeaveRequest(),
            log=lambda record: path.append(weights[name].clone()),
            evaluate=lambda step: None,
        )
    assert not any(torch.equal(path[i], path[i + 1]) for i in range(3))
    constant = path[0] / 8 + path[1] / 8 + path[2] / 4 + path[3] / 2
    # Karras et al., 2024, eq. 127: step t takes the share 1 - (1 - 1/t)^(gamma + 1).
    shares = 1 - (1 - 1 / np.arange(1, 4)) ** (power_gamma(0.1) + 1)
    power = torch.zeros_like(path[0])
    for value, share in zip(path[1:], shares.tolist(), strict=True):
        power = (1 - share) * power + share * value
    pieces = trainer.ema.pieces()
    for kind, expected in (("ema", constant), ("ema_power_0.1", power)):
        found = pieces[f"{kind}/{name}"].data.view(expected.shape)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("every", "message"),
    [
        (1000, "nothing was saved yet. Start it again with a lower train.lr"),
        (1, "the newest checkpoint is of step 1. Start it again with a lower train.lr"),
    ],
)
def test_a_divergence_is_a_failure_and_tells_where_to_go_on(digits, tmp_path, every, message):
    diverging = (*AT_ONCE, "--train.lr=1e30", f"--checkpoint.every_steps={every}")
    with pytest.raises(DivergenceError, match=f"step 2: loss (inf|nan).*{message}") as caught:
        train(digits, tmp_path, *STEPS, *diverging)
    assert caught.value.exit_code == 1


def test_what_changes_the_state_lets_a_save_copy_it_first(digits, tmp_path):
    """On a GPU the copy runs beside the next step, up to its update."""
    evaluating = ("--evaluation.every_steps=2", "--checkpoint.every_steps=2")
    experiment = demo_experiment(digits, tmp_path, *SINGLE, *STEPS, *evaluating)
    trainer, events = build_trainer(experiment, ALONE), []
    backward, step = trainer.engine.backward, trainer.engine.step
    trainer.engine.backward = lambda loss: (events.append("backward"), backward(loss))[1]
    trainer.engine.step = lambda judge=None, averaging=(): (
        events.append("update"),
        step(judge, averaging),
    )[1]
    trainer.checkpoints.before_change = lambda: events.append("copied")
    with trainer.loader:
        trainer.run(
            LeaveRequest(),
            log=lambda record: None,
            evaluate=lambda step: events.append("evaluation"),
        )
    update = ["backward", "copied", "update"]
    assert events == [*update, *update, "copied", "evaluation", *update]


def broken_gradients(digits: Path, place: Path) -> list[str]:
    """Runs on a rank: return what each engine says of a gradient that is not a number."""
    world, found = join_world(needs_process_group=True), []
    for engine in ("zero1_bf16", "zero2_bf16", "zero3_bf16"):
        overrides = (*setting(engine), *AT_ONCE, "--checkpoint.every_steps=1")
        trainer = build_trainer(demo_experiment(digits, place / engine, *overrides), world)
        weight: Any = trainer.engine.network.get_parameter("final_layer.linear.weight")
        # The loss is finite and the norm alone tells.
        weight.register_hook(lambda gradient: gradient * float("nan"))
        with trainer.loader, pytest.raises(DivergenceError) as caught:
            trainer.run(LeaveRequest(), log=lambda record: None)
        found.append(str(caught.value))
    world.leave()
    return found


def test_a_gradient_that_is_not_a_number_is_a_divergence_under_deepspeed(digits, tmp_path):
    """DeepSpeed's own check of each gradient is off."""
    (found,) = run_on_ranks(1, broken_gradients, digits, tmp_path)
    for message in found:
        assert re.match(
            r"step 1: loss \d\.\d+, gradient norm (inf|nan): .*nothing was saved", message
        )
    assert len(found) == 3
