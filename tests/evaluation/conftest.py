"""Pictures to measure, and an Inception with random weights in a file."""

import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity import FeatureExtractorInceptionV3


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Weights as torch-fidelity stores them, random and scaled so that features do not vanish."""

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(module.weight)
            return super().load_state_dict(self.state_dict())

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "nothing.pth")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Untrained(
            "inception-v3-compat",
            ["2048"],
            feature_extractor_weights_path=str(folder / "nothing.pth"),
        )
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


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
