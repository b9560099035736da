"""The learning rate of each step, and a run that follows it over a resume."""

import math

import pytest

from dtr_scale.errors import ConfigError
from dtr_scale.train.learning_rate import LearningRate
from tests.support.runs import demo_experiment, journal, tiny

STEPS = range(1, 11)


def rates(**settings):
    return [LearningRate(2.0, 10, **settings).at(step) for step in STEPS]


def test_a_constant_rate_is_the_same_number_at_every_step():
    assert rates() == [2.0] * 10
    assert rates(warmup_steps=4) == [0.5, 1.0, 1.5, *[2.0] * 7]


def test_a_cosine_falls_from_the_end_of_the_warm_up_to_the_last_step():
    found = rates(schedule="cosine", warmup_steps=2, final=0.5)
    half = [0.5 + 1.5 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(9)]
    assert found == pytest.approx([1.0, *half])
    assert found[-1] == 0.5


def test_wsd_falls_linearly_at_the_end():
    found = rates(schedule="wsd", warmup_steps=2, decay_steps=4)
    assert found == pytest.approx([1.0, *[2.0] * 5, 1.5, 1.0, 0.5, 0.0])


def test_a_run_makes_each_update_at_the_rate_of_its_step_and_resumes_with_it(digits, tmp_path):
    schedule = (
        "--train.schedule=wsd", "--train.warmup_steps=2", "--train.decay_steps=2",
        "--train.lr=0.01", "--train.final_lr=0.001",
    )  # fmt: skip
    through, resumed, constant = (tmp_path / name for name in ("through", "resumed", "constant"))
    tiny(digits, through, *schedule)
    assert [record["lr"] for record in journal(through)] == pytest.approx(
        [0.005, 0.01, 0.0055, 0.001]
    )
    # The first update's rate is seen in the loss of the second step, the second's in the third.
    tiny(digits, constant, "--train.lr=0.005")
    assert journal(constant)[1]["loss"] == journal(through)[1]["loss"]
    assert journal(constant)[2]["loss"] != journal(through)[2]["loss"]
    # Cut off by max_minutes: `max_steps`, which the schedule ends with, stays.
    assert tiny(digits, resumed, *schedule, "--train.max_minutes=1e-6") == 75
    assert [record["step"] for record in journal(resumed)] == [1]
    assert tiny(digits, resumed, *schedule) == 0
    assert journal(resumed) == journal(through)


def test_an_end_above_the_peak_is_refused(digits, tmp_path):
    given = ("--train.schedule=cosine", "--train.lr=1e-4", "--train.final_lr=1e-3")
    with pytest.raises(ConfigError, match=r"train\.final_lr = 0\.001 exceeds train\.lr = 0\.0001"):
        demo_experiment(digits, tmp_path, *given)
