"""Averages of the weights, on fragments, against their definitions."""

import numpy as np
import pytest
import torch
from torch import nn

from dtr_scale.engines.single import SingleEngine
from dtr_scale.train.ema import ConstantDecay, Ema, PowerFunction, power_gamma


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
        engine.masters()["weight"].data.fill_(weight)
        engine.average(ema.averaging(step))
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


def test_the_first_average_takes_the_place_of_the_weights_for_a_while():
    engine = engine_of_one_weight()
    ema = Ema(engine, [ConstantDecay(0.5, is_first=True), PowerFunction(0.1)])
    engine.masters()["weight"].data.fill_(1.0)
    engine.average(ema.averaging(1))
    with ema.swapped_in():
        assert engine.network(torch.ones(1)).item() == 3.0
    assert engine.network(torch.ones(1)).item() == 1.0
    assert [piece.data.item() for piece in ema.pieces().values()] == [3.0, 1.0]


def test_an_average_knows_since_when_and_how_it_was_made():
    engine = engine_of_one_weight()
    profiles = [ConstantDecay(0.9, is_first=True), PowerFunction(0.1)]
    stored = {"ema": [{"from_step": 0, "decay": 0.5}]}
    ema = Ema(engine, profiles)
    assert ema.meta() == {
        "ema": [{"from_step": 0, "decay": 0.9}],
        "ema_power_0.1": [{"from_step": 0, "sigma_rel": 0.1}],
    }
    engine.masters()["weight"].data.fill_(3.0)
    ema.load(stored, step=7, new={"ema_power_0.1"})
    assert ema.meta() == {
        "ema": [{"from_step": 0, "decay": 0.5}, {"from_step": 7, "decay": 0.9}],
        "ema_power_0.1": [{"from_step": 7, "sigma_rel": 0.1}],
    }
    assert [piece.data.item() for piece in ema.pieces().values()] == [5.0, 3.0]
    later = Ema(engine, profiles)
    later.load(ema.meta(), step=9, new=())
    assert later.meta() == ema.meta()
