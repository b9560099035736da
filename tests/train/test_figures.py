"""A step's figures: how they sum, and that reading them late changes nothing that is kept."""

from typing import Any

import pytest
import torch

from dtr_scale.engines.world import World
from dtr_scale.errors import DivergenceError
from dtr_scale.jobs.build import build_trainer
from dtr_scale.signals import LeaveRequest
from dtr_scale.train.figures import StepSums
from dtr_scale.train.loss import Losses
from tests.support.runs import BATCH, SINGLE, TIMINGS, demo_experiment

ALONE = World(0, 0, 1, torch.device("cpu"))
STEPS = (*SINGLE, *BATCH, "--train.max_steps=7", "--train.log_every=2")
SAVING = "--checkpoint.every_steps=3"
AT_ONCE = ("--train.rollback_after=1", "--train.max_rollbacks=0")


def test_the_sums_of_a_step_are_means_by_cluster():
    sums = StepSums(torch.tensor([1, 2, 0]), [1, 2, 0])
    mse, vb = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.25])
    sums.add(Losses(mse, vb, torch.tensor(2.0)), torch.tensor([1, 0]))
    sums.add(Losses(mse[:1], vb[:1], torch.tensor(1.0)), torch.tensor([1]))
    sums.reduce(ALONE)
    own = torch.tensor([0.25, 8.0])
    figures = sums.to_host(7, 21, torch.tensor(4.0), torch.tensor(0.0), {"uw_log_var": own})
    own.zero_()  # as the next step does, before these are read
    result = figures.read()
    assert (result.mse, result.vb, result.objective) == (5 / 3, 1.25 / 3, 3.0)
    assert result.cluster_loss == {0: 3.25, 1: 1.5}
    assert result.record(lr=0.1) == {
        "step": 7, "samples_seen": 21, "loss": 5 / 3 + 1.25 / 3, "objective": 3.0,
        "mse": 5 / 3, "vb": 1.25 / 3, "loss_cluster_0": 3.25, "loss_cluster_1": 1.5,
        "uw_log_var_0": 0.25, "uw_log_var_1": 8.0, "lr": 0.1, "grad_norm": 4.0,
    }  # fmt: skip


def events_of(digits, place, *, steps_late, breaking_at=None):
    """Train; return what happened in order: ("begun" | "saved", step) or a logged record."""
    trainer = build_trainer(demo_experiment(digits, place, *STEPS, *AT_ONCE, SAVING), ALONE)
    assert trainer.readback.steps_late == 0
    trainer.readback.steps_late = steps_late
    events: list[Any] = []
    checkpoints: Any = trainer.checkpoints
    train_step, save = trainer._train_step, checkpoints.save

    def begin(batches):
        events.append(("begun", trainer.step + 1))
        if trainer.step + 1 == breaking_at:
            weight = trainer.engine.network.get_parameter("final_layer.linear.weight")
            weight.data.fill_(float("nan"))
        return train_step(batches)

    def note(step, *args):
        events.append(("saved", step))
        save(step, *args)

    def log(record):
        events.append({key: value for key, value in record.items() if key not in TIMINGS})

    trainer._train_step, checkpoints.save = begin, note
    with trainer.loader:
        try:
            trainer.run(LeaveRequest(), log=log)
        except DivergenceError as error:
            events.append(str(error))
    return events


def test_figures_that_are_read_late_are_the_same_and_logged_before_a_save(digits, tmp_path):
    at_once, late = (events_of(digits, tmp_path / str(k), steps_late=k) for k in (0, 1))
    records = [[event for event in events if isinstance(event, dict)] for events in (at_once, late)]
    assert records[0] == records[1]
    short = [event["step"] if isinstance(event, dict) else event for event in late]
    assert short == [
        ("begun", 1), ("begun", 2), ("begun", 3), 2, ("saved", 3),
        ("begun", 4), ("begun", 5), 4, ("begun", 6), 6, ("saved", 6), ("begun", 7), 7, ("saved", 7),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("breaking_at", "last"),
    # The step after it has begun, unless its own is saved: that is judged first.
    [(2, ("begun", 3)), (3, ("begun", 3)), (6, ("begun", 6)), (7, ("begun", 7))],
)
def test_a_divergence_that_is_found_late_is_never_saved(digits, tmp_path, breaking_at, last):
    *events, told = events_of(digits, tmp_path, steps_late=1, breaking_at=breaking_at)
    steps = [event for event in events if isinstance(event, tuple)]
    assert steps[-1] == last
    assert told.startswith(f"step {breaking_at}: loss nan")
