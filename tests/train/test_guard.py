"""What counts as a spike, and what is counted."""

import json
import math

import pytest
import torch

from dtr_scale.train.figures import StepResult, StepSums
from dtr_scale.train.guard import WINDOW, UpdateGuard, Verdict
from dtr_scale.train.loss import Losses


def result(step, loss=1.0, norm=2.0, *, skipped=False):
    return StepResult(step, step, loss, 0.0, {}, 0.0, norm, skipped, {})


def after(steps, **settings):
    guard = UpdateGuard(**settings)
    for step in steps:
        guard.note(result(step, loss=float(step), norm=2.0 * step))
    return guard


def test_without_a_factor_anything_finite_will_do():
    assert after(range(1, 200)).limits(200) == (math.inf, math.inf)


def test_a_limit_is_a_multiple_of_the_median_of_the_window_before_the_last_step():
    guard = after(range(1, 201), spike_factor=3.0)
    # Steps 72 to 199: the last that a GPU has told of when step 201 begins.
    assert guard.limits(201) == (3 * 135.5, 6 * 135.5)
    # As if step 200 had not been read yet.
    assert guard.limits(201) == after(range(1, 200), spike_factor=3.0).limits(201)
    assert WINDOW == 128


def test_few_steps_tell_nothing_and_a_median_of_zero_neither():
    assert after(range(1, 33), spike_factor=2.0).limits(33) == (math.inf, math.inf)
    assert after(range(1, 33), spike_factor=2.0).limits(34) == (33.0, 66.0)
    guard = UpdateGuard(spike_factor=2.0)
    for step in range(1, 40):
        guard.note(result(step, norm=0.0))
    assert guard.limits(40) == (2.0, math.inf)


def test_skipped_steps_are_no_history_and_counted_in_a_row():
    guard = after(range(1, 41), spike_factor=2.0, rollback_after=2)
    limits = guard.limits(42)
    for step in (41, 42):
        assert not guard.wants_rollback
        guard.note(result(step, loss=1e9, skipped=True))
    assert guard.wants_rollback
    assert guard.last_update == 40
    assert guard.limits(43) == limits
    guard.note(result(43))
    assert not guard.wants_rollback
    assert guard.counters() == {"skipped_steps": 2, "rollbacks": 0}


def test_it_goes_on_from_what_a_checkpoint_keeps():
    guard = after([k / 7 for k in range(1, 301)], spike_factor=2.0)
    guard.note(result(301, skipped=True))
    guard.rollbacks = 1
    other = UpdateGuard(spike_factor=2.0)
    other.load(json.loads(json.dumps(guard.meta())))
    assert other.meta() == guard.meta()
    for step in range(302, 310):
        assert other.limits(step) == guard.limits(step)
        other.note(result(step, loss=step / 3))
        guard.note(result(step, loss=step / 3))
    other.load({})  # a checkpoint of before there was any of it
    assert other.meta() == UpdateGuard().meta()


@pytest.mark.parametrize(
    ("mse", "vb", "norm", "limits", "skip"),
    [
        (1.0, 0.5, 1.0, (math.inf, math.inf), 0),
        (math.nan, 0.5, 1.0, (math.inf, math.inf), 1),
        (1.0, math.inf, 1.0, (math.inf, math.inf), 1),
        (1.0, 0.5, math.nan, (math.inf, math.inf), 1),
        (1.0, 0.5, math.inf, (math.inf, math.inf), 1),
        (1.0, 0.5, 3e38, (math.inf, math.inf), 0),
        (2.5, 0.5, 1.0, (2.0, 4.0), 1),
        (1.5, 0.5, 5.0, (2.0, 4.0), 1),
        (1.5, 90.0, 3.0, (2.0, 4.0), 0),
        (1.5, math.nan, 3.0, (2.0, 4.0), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_verdict_skips_what_is_not_finite_or_too_large(mse, vb, norm, limits, skip, dtype):
    sums = StepSums(torch.tensor([8]), [8])
    each = torch.ones(8, dtype=torch.float64)
    sums.add(Losses(mse * each, vb * each, torch.tensor(0.0)), torch.zeros(8, dtype=torch.int64))
    verdict = Verdict(sums, 8, limits)
    found = verdict(torch.tensor(norm, dtype=dtype))
    assert (found.item(), found.dtype, found.shape) == (skip, torch.float32, ())
    assert verdict.skip is found
