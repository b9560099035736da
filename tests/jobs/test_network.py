from typing import Any

import pytest
import torch

from dtr_scale.errors import ConfigError
from dtr_scale.jobs.network import build_model as typed_build_model
from dtr_scale.models.build import build_network

build_model: Any = typed_build_model  # tests look into networks

TINY = {
    "type": "dit",
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "patch_size": 2,
    "input_size": 4,
    "num_classes": 10,
    "attention": "sdpa",
}


def test_defaults_are_those_of_dit():
    model = build_model(TINY)
    assert (model.in_channels, model.out_channels, model.learn_sigma) == (4, 8, True)
    assert (model.num_classes, model.class_dropout_prob, model.routing.spec.type) == (
        10,
        0.1,
        "none",
    )


def test_a_variant_sets_the_sizes():
    config = {"type": "dit", "variant": "DiT-B/4", "input_size": 32, "num_classes": 1000}
    with torch.device("meta"):
        model = build_model(config)
    assert (model.hidden_size, len(model.blocks), model.patch_size) == (768, 12, 4)


def test_a_network_on_the_meta_device_does_not_ask_for_cuda():
    with torch.device("meta"):
        model = build_model(TINY | {"attention": "xformers"})
    assert model.blocks[0].attn.attention_backend == "sdpa"


def test_without_conditioning_there_is_one_class_and_no_null_label():
    config = TINY | {"conditioning": "none", "num_classes": None}
    model = build_model(config)
    assert model.y_embedder.embedding_table.num_embeddings == 1
    assert model.class_dropout_prob == 0
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([0, 999]), torch.zeros(2, dtype=torch.int64)
    assert model(x, t, y).shape == (2, 8, 4, 4)


def test_routing_spans_the_timesteps_and_channels():
    model = build_model(TINY | {"routing": {"type": "dtr", "beta": 0.5}}, num_timesteps=20)
    start, stop = model.routing.start_32, model.routing.stop_32
    assert (start[0], start[-1]) == (0, 16)
    assert (stop - start).tolist() == [16] * 20


ADM = {
    "type": "adm", "image_size": 8, "model_channels": 32, "num_res_blocks": 1,
    "attention_resolutions": [2], "channel_mult": [1, 2], "num_classes": 10,
}  # fmt: skip


def test_an_adm_has_the_same_outside():
    model = build_model(ADM | {"routing": {"type": "dtr"}})
    assert (model.in_channels, model.input_size, model.class_dropout_prob) == (3, 8, 0.0)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 9])
    assert model(x, t, y).shape == (2, 6, 8, 8)


def test_an_adm_without_classes_is_unconditional():
    config = {key: value for key, value in ADM.items() if key != "num_classes"}
    assert build_model(config).conditioning == "none"
    assert not hasattr(build_model(config), "label_emb")


def test_experts_make_one_network_or_one_of_them():
    alone = build_model(TINY | {"num_experts": 4, "expert": 2})
    together = build_model(TINY | {"num_experts": 4})
    assert len(together.experts) == 4
    size = sum(parameter.numel() for parameter in alone.parameters())
    assert sum(parameter.numel() for parameter in together.parameters()) == 4 * size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "unte"}, 'model.type = "unte" is unknown; accepted are dit, adm'),
        ({"type": None}, "model.type is missing; accepted are dit, adm"),
        ({"num_classes": None}, "model.num_classes is missing; give the number of classes"),
        ({"depth": None}, "model.depth is missing; set model.variant"),
        ({"hiden_size": 3}, "unknown key model.hiden_size; did you mean model.hidden_size?"),
        ({"routing": {"type": "dtr", "alfa": 1}}, "alfa; did you mean model.routing.alpha?"),
        ({"routing": {"alpha": 1}}, "model.routing.type is missing"),
        ({"depth": 0}, "model.depth = 0: should be greater than or equal to 1"),
        ({"hidden_size": "64"}, 'model.hidden_size = "64": should be a valid integer'),
        ({"num_experts": 0}, "model.num_experts = 0: should be greater than or equal to 1"),
        ({"expert": 3}, "model.expert = 3 is none of model.num_experts = 1"),
        ({"class_dropout_prob": 2}, "model.class_dropout_prob = 2: should be less than or equal"),
        ({"routing": "dtr"}, 'model.routing = "dtr": should be'),
        ({"num_heads": 5}, "model.hidden_size = 32 is not divisible by .*num_heads = 5"),
        ({"hidden_size": 30}, "model.hidden_size = 30: give a multiple of 4"),
        ({"input_size": 5}, "model.input_size = 5 is not divisible by the patch size 2"),
        ({"variant": "DiT-B/2"}, "model.variant = 'DiT-B/2' and model.hidden_size = 32 exclude"),
        ({"conditioning": "sound"}, "model.conditioning = \"sound\": should be 'class', 'none' or"),
    ],
)
def test_a_bad_setting_is_named(change, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        build_model(TINY | change)


def test_an_unknown_variant_is_refused_with_those_there_are():
    config = {"type": "dit", "variant": "DiT-L2", "input_size": 32, "num_classes": 10}
    with pytest.raises(ConfigError, match=r'model\.variant = "DiT-L2": accepted are .*DiT-L/2'):
        build_model(config)


def test_a_network_is_built_without_being_judged_again():
    torch.manual_seed(0)
    plain = build_network(**TINY)
    torch.manual_seed(0)
    judged = build_model(TINY)
    for name, value in judged.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])
