"""Averages of any width out of stored ones, against those that were really kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.train.ema import PowerFunction
from dtr_scale.train.reconstruction import StoredAverage, combine

STEPS = 1800
WIDTHS = (0.05, 0.1)


def profile(average):
    """How much of the weights after each step an average holds: the recursion, step by step."""
    shares = np.zeros(STEPS + 1)
    shares[average.began] = 1.0
    for step in range(average.began + 1, average.step + 1):
        decay = PowerFunction(average.sigma_rel).decay(step)
        shares *= decay
        shares[step] += 1.0 - decay
    return shares[1:]


def snapshots(began=0, every=200):
    steps = range(every, STEPS + 1, every)
    return [StoredAverage(t, width, began) for t in steps if t >= began for width in WIDTHS]


def whole_run(stored):
    return [average._replace(began=0) for average in stored]


@settings(deadline=None, max_examples=30)
@given(
    sigma_rel=st.floats(0.04, 0.15),
    num_snapshots=st.integers(10, 40),
    every=st.sampled_from([10, 5_000, 100_000]),
)
def test_averages_of_other_widths_are_made_of_two_stored_ones(sigma_rel, num_snapshots, every):
    steps = range(every, every * num_snapshots + 1, every)
    stored = [StoredAverage(step, width) for step in steps for width in WIDTHS]
    weights, distance = combine(stored, every * num_snapshots, sigma_rel)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert distance < 0.12


def test_a_stored_average_is_its_own_combination():
    stored = [StoredAverage(step, width) for step in (100, 200) for width in WIDTHS]
    weights, distance = combine(stored, 200, 0.1)
    assert weights == pytest.approx([0, 0, 0, 1], abs=1e-8)
    assert distance < 1e-6


@pytest.mark.parametrize("began", [0, 700, 1200])
@pytest.mark.parametrize("sigma_rel", [0.07, 0.15, 0.2])
def test_weights_and_distance_are_those_of_the_profiles_step_by_step(began, sigma_rel):
    stored = snapshots(began)
    goal, profiles = profile(StoredAverage(STEPS, sigma_rel)), [profile(a) for a in stored]
    best = np.linalg.lstsq(np.array(profiles).T, goal, rcond=None)[0]

    def distance(weights):
        return np.linalg.norm(weights @ profiles - goal) / np.linalg.norm(goal)

    weights, told = combine(stored, STEPS, sigma_rel)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert told == pytest.approx(distance(weights), abs=1e-3)
    assert told == pytest.approx(distance(best / best.sum()), abs=1e-3)
    if began == 1200:  # taken for averages of the whole run, they would make quite another
        assert distance(combine(whole_run(stored), STEPS, sigma_rel)[0]) > 5 * told


@pytest.mark.parametrize("began", [0, 500])
def test_a_combination_is_near_the_average_that_was_not_kept(began):
    """Weights that drift and jitter, as in training."""
    rng = np.random.default_rng(1)
    weights = np.sin(np.arange(1, STEPS + 1) / 400) + 0.1 * rng.normal(size=STEPS)
    stored = snapshots(began)
    values = np.array([profile(average) @ weights for average in stored])
    truth = profile(StoredAverage(STEPS, 0.15)) @ weights
    assert combine(stored, STEPS, 0.15)[0] @ values == pytest.approx(truth, abs=0.01)
    assert abs(values[-1] - truth) > 0.03  # the stored ones are not near it
