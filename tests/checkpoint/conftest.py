"""Files of weights in a temporary folder."""

import pytest
import torch
from safetensors.torch import load_file

from dtr_scale.checkpoint.export import export_dit


@pytest.fixture
def exported(tmp_path):
    """Weights of ours as the official state dict that `export_dit` makes of them."""

    def export(state_dict, config, num_timesteps=1000):
        export_dit(state_dict, config, tmp_path / "exported.safetensors", num_timesteps)
        return load_file(tmp_path / "exported.safetensors")

    return export


@pytest.fixture
def saved(tmp_path):
    def save(content, **options):
        torch.save(content, tmp_path / "weights.pt", **options)
        return tmp_path / "weights.pt"

    return save
