"""Small networks and their weights in the layouts that others use."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch_fidelity import FeatureExtractorInceptionV3

from dtr_scale.jobs.network import build_model
from dtr_scale.models.routing import routing_mask

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASED = np.load(GOLDEN / "dtr_dit_forward.npz")
SIZES = {"hidden_size": 64, "depth": 3, "patch_size": 2, "input_size": 8, "in_channels": 4}
CONFIG: dict[str, Any] = {"type": "dit", "num_heads": 4, "num_classes": 10, **SIZES}
ADM: dict[str, Any] = {
    "type": "adm", "image_size": 8, "model_channels": 32, "num_res_blocks": 1,
    "attention_resolutions": [2], "channel_mult": [1, 2], "num_classes": 5,
}  # fmt: skip


def mask_name(block):
    return f"blocks.{block}.routing._unit_mapping"


def released(masks=None):
    """The released code's small network in the official layout, with a mask for each block."""
    names = [name for name in RELEASED.files if name.startswith("w.")]
    weights = {name[2:]: torch.tensor(RELEASED[name]) for name in names}
    masks = [] if masks is None else [masks] * 3 if isinstance(masks, torch.Tensor) else masks
    return weights | {mask_name(i): mask.float() for i, mask in enumerate(masks)}


def dtr_masks(**settings):
    return routing_mask("dtr", 1000, 64, **settings)


def random_network(config, num_timesteps=1000):
    """A network whose output depends on all its weights."""
    network = build_model(config, num_timesteps=num_timesteps)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return network.eval()


def batch(channels=4, size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, channels, size, size, generator=generator)
    return x, torch.tensor([0, 1, 17, 250, 700, 999]), torch.tensor([0, 3, 9, 10, 10, 5])


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}
AVERAGED = {name: -value for name, value in WEIGHTS.items()}


def checkpoint(**extra):
    return {"model": WEIGHTS, "ema": AVERAGED, "opt": {"state": {0: {"step": 3}}}, **extra}


def random_inception(folder: Path) -> Path:
    """Write an Inception as torch-fidelity stores it, with weights that let no feature vanish."""

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(module.weight)
            return super().load_state_dict(self.state_dict())

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
