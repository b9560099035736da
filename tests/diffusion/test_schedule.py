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


def spread(count, size):
    """improved-diffusion's rule for a section: a running sum of one stride, rounded."""
    stride = 1 if count <= 1 else (size - 1) / (count - 1)
    place, kept = 0.0, []
    for _ in range(count):
        kept.append(round(place))
        place += stride
    return kept


@pytest.mark.parametrize("num_timesteps", [2, 10, 97, 1000])
def test_counts_keep_what_improved_diffusion_keeps(num_timesteps):
    for count in range(1, num_timesteps + 1, 1 + num_timesteps // 100):
        kept = space_timesteps(num_timesteps, str(count))
        assert kept.tolist() == spread(count, num_timesteps)
        assert len(set(kept.tolist())) == count


@pytest.mark.parametrize("counts", [(10, 20, 30), (1, 1), (333, 1, 7), (250, 250, 250, 250)])
def test_sections_keep_what_improved_diffusion_keeps(counts):
    expected, first = [], 0
    for i, count in enumerate(counts):  # the first sections are one longer where it does not fit
        size = 1000 // len(counts) + (i < 1000 % len(counts))
        expected += [first + place for place in spread(count, size)]
        first += size
    assert space_timesteps(1000, ",".join(map(str, counts))).tolist() == expected


@pytest.mark.parametrize("num_timesteps", [10, 97, 1000])
def test_a_stride_keeps_as_many_as_asked_or_is_refused(num_timesteps):
    strides = {len(range(0, num_timesteps, s)): s for s in range(num_timesteps - 1, 0, -1)}
    for count in range(1, num_timesteps + 1):
        if count in strides:
            kept = space_timesteps(num_timesteps, f"ddim{count}")
            assert kept.tolist() == list(range(0, num_timesteps, strides[count]))
        else:
            with pytest.raises(ConfigError, match=f"no whole-number stride keeps {count}"):
                space_timesteps(num_timesteps, f"ddim{count}")


def test_odd_forms_of_a_good_respacing():
    assert np.array_equal(space_timesteps(1000, " 250"), space_timesteps(1000, "250"))
    assert np.array_equal(space_timesteps(1000, "10, 20"), space_timesteps(1000, "10,20"))
    assert space_timesteps(1000, "ddim1000").tolist() == list(range(1000))
    assert space_timesteps(1000, "ddim7").tolist() == list(range(0, 1000, 143))


@pytest.mark.parametrize(
    ("respacing", "reason"),
    [
        ("0", "0 steps of 10 timesteps; choose at least 1, of at least 1"),
        ("11", "11 steps of 10 timesteps; choose at most 10"),
        ("5,6", "6 steps of 5 timesteps; choose at most 5"),
        ("-1", "'-1' is no number of steps; give e.g. '250', 'ddim50' or '10,20,30'"),
        ("abc", "'abc' is no number of steps; give e.g. '250', 'ddim50' or '10,20,30'"),
        ("5,", "'' is no number of steps; give e.g. '250', 'ddim50' or '10,20,30'"),
        ("1.5", "'1.5' is no number of steps; give e.g. '250', 'ddim50' or '10,20,30'"),
        (" ", "' ' is no number of steps; give e.g. '250', 'ddim50' or '10,20,30'"),
        ("ddim", "'' is no number of steps; give e.g. '250', 'ddim50' or '10,20,30'"),
        ("ddim-5", "'-5' is no number of steps; give e.g. '250', 'ddim50' or '10,20,30'"),
        ("ddim0", "no whole-number stride keeps 0 of 10 timesteps; give 'ddim2', the nearest"),
        ("ddim6", "no whole-number stride keeps 6 of 10 timesteps; give 'ddim5', the nearest"),
        ("1,1,1,1,1,1,1,1,1,1,1", "1 steps of 0 timesteps; choose at least 1, of at least 1"),
    ],
)
def test_a_respacing_that_does_not_fit_is_refused(respacing, reason):
    with pytest.raises(ConfigError) as refusal:
        space_timesteps(10, respacing)
    assert str(refusal.value) == f"timestep_respacing = {respacing!r}: {reason}"


def test_a_linear_schedule_of_few_timesteps_is_refused():
    assert beta_schedule("linear", 21).max() < 1
    with pytest.raises(ConfigError, match="num_timesteps = 20: too few for the linear schedule"):
        beta_schedule("linear", 20)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match="'sigmoid': unknown; give one of linear, cosine"):
        beta_schedule("sigmoid", 10)


@pytest.mark.parametrize(
    ("given", "text"), [(None, ""), (250, "250"), ([10, 20, 30], "10,20,30"), ((5,), "5")]
)
def test_respacing_may_be_numbers(given, text):
    assert np.array_equal(space_timesteps(1000, given), space_timesteps(1000, text))
