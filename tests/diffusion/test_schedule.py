from pathlib import Path

import numpy as np
import pytest

from dtr_scale.diffusion.schedule import beta_schedule, space_timesteps
from dtr_scale.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_betas_equal_the_released_code(name):
    expected = np.load(GOLDEN / "losses.npz")[f"{name}.betas"]
    np.testing.assert_allclose(beta_schedule(name, 1000), expected, rtol=1e-10)


@pytest.mark.parametrize("count", ["50", "250"])
def test_kept_timesteps_equal_the_released_code(count):
    expected = np.load(GOLDEN / "samplers.npz")[f"linear.{count}.timesteps"]
    assert np.array_equal(space_timesteps(1000, count), expected)


def test_linear_keeps_its_total_noise_at_other_lengths():
    long, short = beta_schedule("linear", 1000), beta_schedule("linear", 100)
    assert short.sum() == pytest.approx(long.sum(), rel=1e-12)


def test_respacings():
    assert space_timesteps(10, "").tolist() == list(range(10))
    assert space_timesteps(10, "1").tolist() == [0]
    assert space_timesteps(10, "4").tolist() == [0, 3, 6, 9]
    assert space_timesteps(9, "1,2,3").tolist() == [0, 3, 5, 6, 7, 8]
    assert space_timesteps(1000, "ddim25").tolist() == list(range(0, 1000, 40))


@pytest.mark.parametrize("respacing", ["11", "0", "ddim7", "ddim", "fast", "5,6"])
def test_a_respacing_that_does_not_fit_is_refused(respacing):
    with pytest.raises(ConfigError, match=f"timestep_respacing: '{respacing}'.*10 timesteps"):
        space_timesteps(10, respacing)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match="'sigmoid' is unknown; accepted: linear, cosine"):
        beta_schedule("sigmoid", 10)
