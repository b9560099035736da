import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dtr_scale.diffusion.guidance import cfg_model
from dtr_scale.errors import ConfigError
from dtr_scale.models.dit import DiT
from dtr_scale.models.routing import RoutingSpec

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dtr_dit_forward.npz")


class ToyModel:
    """eps = y and sigma = 10 y in every channel; the null label is 7, or a text's sum."""

    in_channels = 4
    class_dropout_prob = 0.1

    def __init__(self):
        self.steps = []

    def __call__(self, x, t, y, step=None):
        self.steps.append(step)
        eps = y.flatten(1).sum(1) if y.dim() == 3 else y
        eps = eps.view(-1, 1, 1, 1).float().expand_as(x)
        return torch.cat([eps, 10 * eps], dim=1)

    def null_like(self, y):
        return torch.full_like(y, 7 if y.dim() == 1 else 0)


INPUT = torch.zeros(2, 4, 2, 2), torch.tensor([3, 4]), torch.tensor([1, 2])


def test_guidance_equals_the_released_code():
    config = json.loads(str(GOLDEN["config"]))
    window = {key: config.pop(key) for key in ("alpha", "beta")}
    model = DiT(**config, routing=RoutingSpec("dtr", **window))
    weights = {k[2:]: torch.tensor(GOLDEN[k]) for k in GOLDEN.files if k.startswith("w.")}
    weights.pop("pos_embed")
    model.load_state_dict(weights)
    x, t, y = (torch.tensor(GOLDEN[name]) for name in ("x", "t", "y"))
    with torch.no_grad():
        # In fp64: two CPUs round apart what guidance then scales up.
        out = cfg_model(model.double(), cfg_scale=1.5, cfg_channels=4)(x, t, y)
    expected = torch.tensor(GOLDEN["out_cfg1_5"][:8])  # its second half is the null label's sigma
    assert (out - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(("cfg_channels", "guided"), [(3, 3), (4, 4), (None, 4), ("all", 4)])
def test_the_first_channels_of_eps_are_guided(cfg_channels, guided):
    out = cfg_model(ToyModel(), cfg_scale=3.0, cfg_channels=cfg_channels)(*INPUT)[..., 0, 0]
    eps = [7 + 3.0 * (1 - 7)] * guided + [1.0] * (4 - guided)
    assert out[0].tolist() == eps + [10.0] * 4


def test_texts_are_guided_away_from_the_null_text_of_the_data():
    x, t, _ = INPUT
    y, null = torch.full((2, 3, 5), 2.0), torch.ones(3, 5)
    zeros = cfg_model(ToyModel(), cfg_scale=3.0)(x, t, y)[:, 0, 0, 0]
    given = cfg_model(ToyModel(), cfg_scale=3.0, null_condition=null)(x, t, y)[:, 0, 0, 0]
    assert zeros.tolist() == [0 + 3 * 30.0] * 2
    assert given.tolist() == [15 + 3 * 15.0] * 2


def test_scale_1_costs_one_plain_forward():
    model = ToyModel()
    assert cfg_model(model, cfg_scale=1.0) is model


def test_a_network_without_null_label_cannot_be_guided():
    model = ToyModel()
    model.class_dropout_prob = 0.0
    with pytest.raises(
        ConfigError, match=r"cfg_scale = 1\.5: needs a model trained with a null label"
    ):
        cfg_model(model)


def test_more_channels_than_there_are_cannot_be_guided():
    with pytest.raises(ConfigError, match="cfg_channels = 5: not accepted; give 1 to 4"):
        cfg_model(ToyModel(), cfg_channels=5)


def test_text_is_guided_against_the_null_text():
    x, t, _ = INPUT
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.5, 0.0], [0.0, 0.0]]])
    out = cfg_model(ToyModel(), cfg_scale=2.0)(x, t, tokens)[:, :, 0, 0]
    assert out.tolist() == [[12.0] * 4 + [60.0] * 4, [1.0] * 4 + [5.0] * 4]


def test_the_training_step_reaches_the_network():
    model = ToyModel()
    cfg_model(model)(*INPUT)
    cfg_model(model)(*INPUT, 500)
    assert model.steps == [None, 500]


def test_inside_the_interval_alone_is_guided():
    x, y = torch.zeros(5, 4, 2, 2), torch.tensor([1, 2, 3, 4, 5])
    t = torch.tensor([0, 199, 200, 699, 700])
    guided = cfg_model(ToyModel(), cfg_scale=3.0)(x, t, y)
    out = cfg_model(ToyModel(), cfg_scale=3.0, cfg_interval=(200, 700))(x, t, y)
    plain = ToyModel()(x, t, y)
    assert torch.equal(out[2:4], guided[2:4])
    assert torch.equal(out[[0, 1, 4]], plain[[0, 1, 4]])
    everywhere = cfg_model(ToyModel(), cfg_scale=3.0, cfg_interval=(0, 1000))(x, t, y)
    assert torch.equal(everywhere, guided)


@pytest.mark.parametrize("interval", [(700, 200), (5, 5), (-1, 5), (0, float("nan"))])
def test_an_empty_interval_is_refused(interval):
    with pytest.raises(ConfigError, match=r"cfg_interval = \[.*\]: not accepted; give timesteps"):
        cfg_model(ToyModel(), cfg_interval=interval)
