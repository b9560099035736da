"""Export our networks in DiT's official layout."""

import pytest
import torch

from dtr_scale.checkpoint.convert import from_official, load_official, official_config
from dtr_scale.checkpoint.export import export_dit
from dtr_scale.errors import CheckpointError, ConfigError
from dtr_scale.jobs.network import build_model
from dtr_scale.models.routing import routing_mask
from tests.support.weights import (
    ADM,
    CONFIG,
    assert_same,
    batch,
    mask_name,
    random_network,
    released,
)


def test_an_official_file_comes_back_as_it_was(exported, saved):
    weights = load_official(saved({"ema": released()}), "dit")
    written = exported(weights, CONFIG)
    expected = {name: value.float() for name, value in released().items()}
    torch.testing.assert_close(written.pop("pos_embed"), expected.pop("pos_embed"))
    assert_same(written, expected)


@pytest.mark.parametrize("kind", ["dtr", "dtr_eq4", "cdtr", "ercddt", "random"])
def test_a_routed_network_takes_its_masks_along(exported, kind):
    config = CONFIG | {"routing": {"type": kind, "seed": 3}}
    network = random_network(config, num_timesteps=100)
    official = exported(network.state_dict(), config, num_timesteps=100)
    for block in range(3):
        mask = routing_mask(kind, 100, 64, seed=3, block=block)
        assert torch.equal(official[mask_name(block)], mask.float())
    back = build_model(official_config(official, "dtr", num_heads=4), num_timesteps=100)
    back.load_state_dict(from_official(official, "dtr"))
    x, t, y = batch()
    with torch.no_grad():
        assert torch.equal(back(x, t // 10, y), network(x, t // 10, y))


UNFIT = [
    (ADM, "'adm' is no DiT"),
    (CONFIG | {"conditioning": "text"}, "'text' adds cross-attention"),
    (CONFIG | {"num_experts": 2}, "2 networks are not one"),
    (CONFIG | {"qk_norm": True}, "qk_norm: true adds norms"),
    (CONFIG | {"routing": {"type": "max_roaming"}}, "'max_roaming' has other masks at every"),
]


@pytest.mark.parametrize(("config", "reason"), UNFIT)
def test_what_has_no_official_layout_is_refused(tmp_path, config, reason):
    weights = random_network(config).state_dict()
    with pytest.raises(ConfigError, match=f"{reason}.*official layout cannot hold"):
        export_dit(weights, config, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_is_written_can_be_read_by_whom_other_files_can(tmp_path):
    (tmp_path / "other").touch()
    out = tmp_path / "out.safetensors"
    export_dit(random_network(CONFIG).state_dict(), CONFIG, out)
    assert out.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_place_that_cannot_be_written_is_named_and_keeps_what_was_there(tmp_path):
    weights = random_network(CONFIG).state_dict()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CheckpointError, match=r"file/out\.safetensors cannot be written: "):
        export_dit(weights, CONFIG, tmp_path / "file" / "out.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="folder cannot be written: Is a directory"):
        export_dit(weights, CONFIG, tmp_path / "folder")
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
