"""Averages of the weights, on fragments, against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dtr_scale.engines.single import SingleEngine
from dtr_scale.train.ema import ConstantDecay, Ema, PowerFunction, combination, power_gamma


def engine_of_one_weight():
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 5.0)
    return SingleEngine(network, device=torch.device("cpu"), lr=1e-3)


def averages(profiles, weights):
    """Return each profile's average after every step of a training that makes these weights."""
    engine = engine_of_one_weight()
    ema = Ema(engine, profiles)
    history = []
    for step, weight in enumerate(weights, 1):
        engine.fragments()[0].master.fill_(weight)
        ema.update(step)
        history.append([piece.data.item() for piece in ema.pieces().values()])
    return np.array(history)


def test_several_decays_are_averaged_at_once():
    weights = np.random.default_rng(0).normal(size=30)
    found = averages([ConstantDecay(0.9, is_first=True), ConstantDecay(0.5)], weights)
    expected = {0.9: 5.0, 0.5: 5.0}
    for step, weight in enumerate(weights):
        expected = {d: d * value + (1 - d) * weight for d, value in expected.items()}
        assert found[step] == pytest.approx(list(expected.values()), rel=1e-5)


def test_keys_name_the_profiles():
    profiles = [ConstantDecay(0.9999, is_first=True), ConstantDecay(0.999), PowerFunction(0.05)]
    keys = list(Ema(engine_of_one_weight(), profiles).pieces())
    assert keys == ["ema/weight", "ema_0.999/weight", "ema_power_0.05/weight"]


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.25])
def test_a_power_function_has_its_width(sigma_rel):
    gamma = power_gamma(sigma_rel)
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000
    profile = (gamma + 1) * tau**gamma
    mean = (profile * tau).mean()
    deviation = np.sqrt((profile * (tau - mean) ** 2).mean())
    assert deviation == pytest.approx(sigma_rel, rel=1e-4)


def test_a_power_function_weighs_the_past_by_its_exponent():
    num_steps, sigma_rel = 400, 0.1
    gamma = power_gamma(sigma_rel)
    shares = []
    for step in range(num_steps):  # the average of an impulse is the impulse's share
        impulse = np.zeros(num_steps)
        impulse[step] = 1.0
        if step % 40 == 39:
            shares.append(averages([PowerFunction(sigma_rel)], impulse)[-1, 0])
    steps = np.arange(40, num_steps + 1, 40)
    expected = (gamma + 1) * (steps / num_steps) ** gamma / num_steps
    assert shares == pytest.approx(list(expected), rel=0.15, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    sigma_rel=st.floats(0.04, 0.15),
    num_snapshots=st.integers(10, 40),
    every=st.sampled_from([10, 5_000, 100_000]),
)
def test_averages_of_other_widths_are_made_of_two_stored_ones(sigma_rel, num_snapshots, every):
    stored = [(every * k, s) for k in range(1, num_snapshots + 1) for s in (0.05, 0.1)]
    weights, distance = combination(stored, every * num_snapshots, sigma_rel)
    assert weights.sum() == pytest.approx(1.0, abs=0.01)
    assert distance < 0.12


def test_a_stored_average_is_its_own_combination():
    stored = [(100, 0.05), (100, 0.1), (200, 0.05), (200, 0.1)]
    weights, distance = combination(stored, 200, 0.1)
    assert weights == pytest.approx([0, 0, 0, 1], abs=1e-8)
    assert distance < 1e-6


def test_a_combination_of_real_averages_is_the_average_that_was_not_kept():
    """Weights that drift and jitter, as in training; nine snapshots of two widths."""
    rng = np.random.default_rng(1)
    weights = np.sin(np.arange(1, 1801) / 400) + 0.1 * rng.normal(size=1800)
    kept = averages([PowerFunction(0.05), PowerFunction(0.1), PowerFunction(0.15)], weights)
    steps = range(200, 1801, 200)
    stored = [(step, sigma) for step in steps for sigma in (0.05, 0.1)]
    values = [kept[step - 1, i] for step in steps for i in (0, 1)]
    combined = combination(stored, 1800, 0.15)[0] @ np.array(values)
    assert combined == pytest.approx(kept[-1, 2], abs=0.01)
    assert abs(kept[-1, 1] - kept[-1, 2]) > 0.03  # the stored ones are not near it


def test_the_first_average_takes_the_place_of_the_weights_for_a_while():
    engine = engine_of_one_weight()
    ema = Ema(engine, [ConstantDecay(0.5, is_first=True), PowerFunction(0.1)])
    engine.fragments()[0].master.fill_(1.0)
    ema.update(1)
    with ema.swapped_in():
        assert engine.network(torch.ones(1)).item() == 3.0
    assert engine.network(torch.ones(1)).item() == 1.0
    assert [piece.data.item() for piece in ema.pieces().values()] == [3.0, 1.0]
