"""Multiplications counted per layer are the published ones, and those counted by hand."""

import pytest
import torch

from dtr_scale.evaluation.flops import forward_cost
from dtr_scale.jobs.network import build_model
from tests.support.weights import CONFIG

# Peebles & Xie (2023), table of all models at 256x256: 10^9 MACs and 10^6 parameters.
PUBLISHED = {
    "DiT-S/8": (0.36, 33), "DiT-S/4": (1.41, 33), "DiT-S/2": (6.06, 33),
    "DiT-B/8": (1.42, 131), "DiT-B/4": (5.56, 130), "DiT-B/2": (23.01, 130),
    "DiT-L/8": (5.01, 459), "DiT-L/4": (19.70, 458), "DiT-L/2": (80.71, 458),
    "DiT-XL/8": (7.39, 676), "DiT-XL/4": (29.05, 675), "DiT-XL/2": (118.64, 675),
}  # fmt: skip
# Dhariwal & Nichol (2021), with the figures that DiT's tables give for it.
ADM = {
    "type": "adm",
    "model_channels": 256,
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "num_classes": 1000,
}
ADM_256 = {"channel_mult": [1, 1, 2, 2, 4, 4], "attention_resolutions": [8, 16, 32]}
LENGTH, WIDTH, CHANNELS = 16, CONFIG["hidden_size"], CONFIG["in_channels"]


def cost_of(config, y_shape=()):
    """Count a network that has no memory; y is a label, or a tensor of `y_shape`."""
    with torch.device("meta"):
        network = build_model(config)
        x = torch.empty(1, network.in_channels, network.input_size, network.input_size)
        t = torch.zeros(1, dtype=torch.int64)
        return forward_cost(network, x, t, torch.empty(1, *y_shape) if y_shape else t)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_a_dit_costs_what_was_published(variant):
    config = {"type": "dit", "variant": variant, "input_size": 32, "num_classes": 1000}
    total = cost_of(config).total
    gmacs, millions = PUBLISHED[variant]
    assert total.macs / 1e9 == pytest.approx(gmacs, rel=1e-3, abs=0.005)
    assert total.num_parameters / 1e6 == pytest.approx(millions, abs=0.6)


def test_the_unet_costs_what_was_published():
    total = cost_of(ADM | ADM_256 | {"image_size": 256, "in_channels": 3}).total
    assert total.macs / 1e9 == pytest.approx(1120, abs=0.5)
    assert total.num_parameters / 1e6 == pytest.approx(554, abs=0.5)


def test_every_layer_is_what_it_is_by_hand():
    layers = cost_of(CONFIG).layers
    patch = 2 * 2 * CHANNELS
    square = WIDTH * WIDTH
    block = LENGTH * (3 + 1 + 4 + 4) * square + 2 * LENGTH**2 * WIDTH + 6 * square
    expected = {
        "x_embedder.proj": LENGTH * patch * WIDTH,
        "t_embedder": 256 * WIDTH + square,
        "y_embedder": 0,
        "blocks.1.attn": LENGTH * 4 * square + 2 * LENGTH**2 * WIDTH,
        "blocks.1.attn.qkv": LENGTH * 3 * square,
        "blocks.2.adaLN_modulation": 6 * square,
        "blocks.2": block,
        "blocks": 3 * block,
        "final_layer": LENGTH * WIDTH * 2 * patch + 2 * square,
    }
    assert {name: layers[name].macs for name in expected} == expected
    parts = ("x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer")
    assert layers[""].macs == sum(layers[part].macs for part in parts)
    assert layers["y_embedder"].num_parameters == 11 * WIDTH
    assert "routing" not in layers and "blocks.0.norm1" not in layers


@pytest.mark.parametrize("kind", ["dtr", "random", "max_roaming"])
def test_routing_costs_no_multiplication_that_counts(kind):
    assert cost_of(CONFIG | {"routing": {"type": kind}}).total == cost_of(CONFIG).total


def test_text_costs_its_attention():
    tokens, width = 5, 12
    text = {"conditioning": "text", "context_length": tokens, "context_dim": width}
    cost = cost_of(CONFIG | text, (tokens, width))
    added = cost.layers["blocks.0"].macs - cost_of(CONFIG).layers["blocks.0"].macs
    cross = 2 * LENGTH * WIDTH**2 + 2 * tokens * width * WIDTH + 2 * LENGTH * tokens * WIDTH
    assert added == cross + 3 * WIDTH**2
    assert cost.layers["blocks.0.cross_attn"].macs == cross


def test_of_experts_a_sample_meets_one():
    one, four = cost_of(CONFIG), cost_of(CONFIG | {"num_experts": 4})
    assert four.total == (one.total.macs, 4 * one.total.num_parameters)
    assert four.layers["experts.0.blocks.2"] == one.layers["blocks.2"]


def test_groups_are_the_parts_and_one_of_a_row():
    groups = cost_of(CONFIG).groups()
    names = ["x_embedder", "t_embedder", "y_embedder", "blocks.0", "blocks", "final_layer"]
    assert list(groups) == names
    unet = ADM | {"image_size": 64, "channel_mult": [1, 2], "attention_resolutions": [2]}
    names = ["time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out"]
    assert list(cost_of(unet).groups()) == names
