"""Export our networks as folders for diffusers."""

import json

import pytest
import torch

from dtr_scale.checkpoint.export import export_diffusers
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.network import build_model
from tests.support.weights import CONFIG, batch, load_diffusers, random_network


@pytest.mark.parametrize("changed", [{}, {"learn_sigma": False, "in_channels": 3, "patch_size": 4}])
def test_diffusers_computes_what_our_network_computes(tmp_path, changed):
    config = CONFIG | changed
    network = random_network(config)
    export_diffusers(network.state_dict(), config, tmp_path / "dit")
    model = load_diffusers(tmp_path / "dit")
    x, t, y = batch(channels=config["in_channels"])
    assert network.null_label in y
    with torch.no_grad():
        expected = network(x, t, y)
        unmended = model(x, timestep=t, class_labels=y).sample
        readme = (tmp_path / "dit" / "README.md").read_text()
        mend = readme[readme.index("for block in") : readme.rindex("```")]
        exec(mend, {"model": model})
        out = model(x, timestep=t, class_labels=y).sample
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    # diffusers' own frequencies: when this fails it has taken DiT's, and README.md can go.
    assert torch.allclose(unmended[0], expected[0], atol=1e-5)
    assert (unmended[5] - expected[5]).abs().max() > 0.1 * expected.abs().max()


def test_diffusers_rebuilds_the_positions(tmp_path):
    config = CONFIG | {"input_size": 12, "patch_size": 2, "hidden_size": 384, "num_heads": 6}
    network = random_network(config)
    export_diffusers(network.state_dict(), config, tmp_path)
    table = load_diffusers(tmp_path).pos_embed.pos_embed
    torch.testing.assert_close(table, network.get_buffer("pos_embed"), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"routing": {"type": "dtr"}}, "routing.type: 'dtr' cannot be converted, .* has no masks"),
        ({"conditioning": "none"}, "class_dropout_prob: 0 cannot be converted"),
        ({"class_dropout_prob": 0.0}, "class_dropout_prob: 0 cannot be converted"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(tmp_path, changed, reason):
    config = CONFIG | changed
    with pytest.raises(ConfigError, match=reason):
        export_diffusers(random_network(config).state_dict(), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_variant_is_spelled_out_for_diffusers(tmp_path):
    config = {"type": "dit", "variant": "DiT-S/8", "input_size": 8, "num_classes": 3}
    export_diffusers(build_model(config).state_dict(), config, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert (described["num_attention_heads"], described["attention_head_dim"]) == (6, 64)
    assert (described["num_layers"], described["num_embeds_ada_norm"]) == (12, 3)
    assert (described["in_channels"], described["out_channels"]) == (4, 8)
