"""Pictures to measure, and an Inception with random weights in a file."""

import numpy as np
import pytest

from tests.support.weights import random_inception


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    return random_inception(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="session")
def pictures():
    """Two sets of 12 pictures uint8 [12, 3, 40, 40]: coloured waves, coarse and fine."""
    random = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(40), np.arange(40))

    def waves(coarse, fine):
        pitch = random.uniform(coarse, fine, (12, 3, 2, 1, 1))
        phase = random.uniform(0, 6, (12, 3, 1, 1))
        return (127 + 120 * np.sin(pitch[:, :, 0] * x + pitch[:, :, 1] * y + phase)).astype("uint8")

    return waves(0.05, 0.5), waves(0.1, 0.9)
