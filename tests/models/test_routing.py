import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.errors import ConfigError
from dtr_scale.models.routing import routing_mask, routing_windows

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "masks_dtr.npz")
CASES = sorted(name.removesuffix("_start") for name in GOLDEN.files if name.endswith("_start"))

shapes = {
    "num_timesteps": st.integers(1, 300),
    "num_channels": st.integers(4, 200),
    "alpha": st.floats(0.25, 8.0),
    "beta": st.floats(0.25, 1.0),
}


def windows(kind, **shape):
    start, stop = routing_windows(kind, **shape)
    return start.numpy(), stop.numpy()


@pytest.mark.parametrize("case", CASES)
def test_dtr_equals_the_released_code(case):
    match = re.fullmatch(r"T(\d+)_C(\d+)_a([\d.]+)_b([\d.]+)", case)
    assert match
    num_timesteps, num_channels = int(match[1]), int(match[2])
    mask = routing_mask("dtr", num_timesteps, num_channels, float(match[3]), float(match[4]))
    first_active = mask.to(torch.int8).argmax(dim=1)
    assert np.array_equal(first_active, GOLDEN[f"{case}_start"])
    assert np.array_equal(mask.sum(dim=1), GOLDEN[f"{case}_active"])


@settings(deadline=None)
@given(**shapes)
def test_dtr_windows_slide_forward_at_one_width(num_timesteps, num_channels, alpha, beta):
    shape = {"num_timesteps": num_timesteps, "num_channels": num_channels}
    start, stop = windows("dtr", **shape, alpha=alpha, beta=beta)
    width = int(beta * num_channels)
    assert np.all(stop - start == width)
    assert np.all(np.diff(start) >= 0)
    assert start[0] == 0
    if num_timesteps > 1:
        assert stop[-1] == num_channels
    mask = routing_mask("dtr", **shape, alpha=alpha, beta=beta).numpy()
    overlap = (mask[:-1] & mask[1:]).sum(axis=1)
    assert np.array_equal(overlap, np.maximum(width - np.diff(start), 0))


@settings(deadline=None)
@given(**shapes)
def test_equation_4_windows_end_where_the_next_begins_plus_the_width(
    num_timesteps, num_channels, alpha, beta
):
    start, stop = windows(
        "dtr_eq4", num_timesteps=num_timesteps, num_channels=num_channels, alpha=alpha, beta=beta
    )
    width = int(beta * num_channels)
    assert np.array_equal(stop[:-1], start[1:] + width)
    assert start[0] == 0
    assert stop[-1] == num_channels
    assert np.all(stop - start >= width)


def test_equation_4_by_hand():
    # C = 10, C_beta = 5, T = 5, alpha = 1: floor(5 t/5) = t.
    start, stop = windows("dtr_eq4", num_timesteps=5, num_channels=10, alpha=1.0, beta=0.5)
    assert start.tolist() == [0, 1, 2, 3, 4]
    assert stop.tolist() == [6, 7, 8, 9, 10]


def test_the_two_forms_of_dtr_differ_by_at_most_three_channels():
    shape = {"num_timesteps": 1000, "num_channels": 768}
    differing = (routing_mask("dtr", **shape) != routing_mask("dtr_eq4", **shape)).sum(dim=1)
    assert 400 < int((differing > 0).sum()) < 600
    assert int(differing.max()) <= 3


def test_none_uses_every_channel():
    assert routing_mask("none", 7, 12).shape == (7, 12)
    assert routing_mask("none", 7, 12).all()


@pytest.mark.parametrize(
    ("kind", "alpha", "beta", "message"),
    [
        ("drt", 4.0, 0.8, "model.routing.type: 'drt'.*accepted: none, dtr, dtr_eq4"),
        ("dtr", 0.0, 0.8, "model.routing.alpha: 0.0"),
        ("dtr", float("nan"), 0.8, "model.routing.alpha: nan"),
        ("dtr_eq4", 4.0, 1.5, "model.routing.beta: 1.5"),
        ("dtr", 4.0, 0.01, "at least one of 64 channels"),
    ],
)
def test_a_bad_setting_is_named(kind, alpha, beta, message):
    with pytest.raises(ConfigError, match=message):
        routing_windows(kind, num_timesteps=10, num_channels=64, alpha=alpha, beta=beta)
