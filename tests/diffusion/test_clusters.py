import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr_scale.diffusion.clusters import timestep_clusters
from dtr_scale.errors import ConfigError


def test_eight_clusters_of_a_thousand_timesteps():
    assert timestep_clusters(1000, 8).tolist() == [0, 125, 250, 375, 500, 625, 750, 875, 1000]


@given(st.integers(1, 400), st.data())
def test_clusters_cover_all_timesteps_and_are_equal_up_to_one(num_timesteps, data):
    num_clusters = data.draw(st.integers(1, num_timesteps))
    boundaries = timestep_clusters(num_timesteps, num_clusters)
    assert boundaries.dtype == np.int64
    assert (boundaries[0], boundaries[-1]) == (0, num_timesteps)
    widths = np.diff(boundaries)
    assert widths.min() >= 1
    assert widths.max() - widths.min() <= 1


@pytest.mark.parametrize("num_clusters", [0, 11])
def test_a_cluster_needs_a_timestep(num_clusters):
    with pytest.raises(ConfigError, match=f"num_clusters: {num_clusters}.*1 to 10"):
        timestep_clusters(10, num_clusters)
