import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtr_scale.errors import ConfigError
from dtr_scale.models import unet
from dtr_scale.models.attention import attention
from dtr_scale.models.routing import RoutingSpec
from dtr_scale.models.unet import ADM, AttentionBlock, ResBlock

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "adm_forward.npz")
TINY: Any = {
    "image_size": 8,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_classes": 5,
    "num_heads": 2,
}
IMAGENET_64: Any = {
    "image_size": 64,
    "model_channels": 192,
    "num_res_blocks": 3,
    "attention_resolutions": [2, 4, 8],
    "channel_mult": [1, 2, 3, 4],
    "num_head_channels": 64,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": True,
}
DTR = RoutingSpec("dtr")


def golden(name):
    return torch.tensor(GOLDEN[name])


def assert_close(actual, expected):
    """Equal to 1e-5 of the largest value."""
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def released(routed):
    """The authors' small network with its weights."""
    config = json.loads(str(GOLDEN["config"]))
    routing = RoutingSpec("dtr", alpha=config.pop("alpha"), beta=config.pop("beta"))
    model = ADM(**config, routing=routing if routed else None)
    weights = {name[2:]: golden(name).float() for name in GOLDEN.files if name.startswith("w.")}
    model.load_state_dict(weights)  # strict: the names are guided-diffusion's
    return model


def tiny_adm(**settings):
    torch.manual_seed(0)
    model = ADM(**TINY | settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_batch():
    torch.manual_seed(1)
    return torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 2])


@pytest.mark.parametrize(("routed", "expected"), [(False, "out_plain"), (True, "out_dtr")])
def test_forward_equals_the_authors_code(routed, expected):
    with torch.no_grad():
        assert_close(released(routed)(golden("x"), golden("t"), golden("y")), golden(expected))


def test_gradients_reach_the_input_and_every_parameter():
    model, x = released(routed=True), golden("x").requires_grad_()
    model(x, golden("t"), golden("y")).square().mean().backward()
    for tensor in (x, *model.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


def test_head_orders_are_one_function_of_permuted_weights():
    legacy, new = tiny_adm(), tiny_adm(use_new_attention_order=True)
    for block in new.blocks:
        if isinstance(block, AttentionBlock):
            rows = torch.arange(3 * block.channels)
            # New row (qkv, head, channel) is legacy row (head, qkv, channel).
            rows = rows.view(block.num_heads, 3, -1).transpose(0, 1).flatten()
            with torch.no_grad():
                for parameter in block.qkv.parameters():
                    parameter.copy_(parameter[rows].clone())
    torch.testing.assert_close(new(*tiny_batch()), legacy(*tiny_batch()))
    assert not torch.allclose(
        tiny_adm(use_new_attention_order=True)(*tiny_batch()), legacy(*tiny_batch())
    )


def test_every_block_is_routed_by_a_mask_of_its_width():
    model, masks = tiny_adm(routing=DTR), []

    def record(block, inputs):
        masks.append(inputs[1 if isinstance(block, AttentionBlock) else 2])

    for block in model.blocks:
        block.register_forward_pre_hook(record)
    model(*tiny_batch())
    assert model.routed_blocks() == model.blocks
    widths = [block.channels for block in model.blocks]
    assert widths == [32, 32, 64, 64, 64, 64, 128, 64, 96, 64, 96, 64]
    assert [mask.shape for mask in masks] == [(3, width) for width in widths]
    for mask, width in zip(masks, widths, strict=True):
        assert mask.sum(1).tolist() == [int(0.8 * width)] * 3
        assert mask[0, 0]
        assert mask[-1, -1]


@pytest.mark.parametrize("resample", [torch.nn.AvgPool2d(2), None])
def test_a_residual_block_reads_the_channels_of_its_mask_alone(resample):
    torch.manual_seed(0)
    block = ResBlock(64, 32, emb_channels=8, resample=resample)
    reads = block.in_layers[2].weight  # [C', C, 3, 3]
    inputs = torch.randn(2, 64, 4, 4), torch.randn(2, 8)
    assert_reads_its_mask(block, reads, lambda mask: block(*inputs, mask))


def test_an_attention_block_reads_the_channels_of_its_mask_alone():
    torch.manual_seed(0)
    block = AttentionBlock(64, num_heads=2)
    x = torch.randn(2, 64, 4, 4)
    assert_reads_its_mask(block, block.qkv.weight, lambda mask: block(x, mask))


def assert_reads_its_mask(block, reads, run):
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    window = torch.arange(64) < 48
    mask = window.expand(2, 64)
    with torch.no_grad():
        out, unrouted = run(mask), run(None)
        reads[:, ~window] = 0
        torch.testing.assert_close(run(mask), out)
        torch.testing.assert_close(run(None), out)
        assert not torch.allclose(unrouted, out)


def test_without_scale_and_shift_the_embedding_enters_before_the_norm():
    torch.manual_seed(0)
    emb = torch.randn(2, 8)
    for width, has_effect in ((32, False), (64, True)):  # one channel a group: the norm removes it
        block = ResBlock(width, width, emb_channels=8)
        torch.nn.init.normal_(block.get_parameter("out_layers.3.weight"))
        x = torch.randn(2, width, 4, 4)
        change = (block(x, emb, None) - block(x, -emb, None)).abs().max()
        assert (change > 0.1) == has_effect


def test_each_sample_is_routed_by_its_own_timestep():
    model = tiny_adm(routing=DTR)
    x, t, y = tiny_batch()
    together = model(x, t, y)
    for n in range(3):
        torch.testing.assert_close(model(x[n : n + 1], t[n : n + 1], y[n : n + 1])[0], together[n])


def test_masks_that_change_in_training_get_its_step():
    model = tiny_adm(routing=RoutingSpec("max_roaming", beta=0.5, update_every_steps=1))
    at_start = model(*tiny_batch(), step=0)
    torch.testing.assert_close(model(*tiny_batch(), step=0), at_start)
    assert not torch.allclose(model(*tiny_batch(), step=3), at_start)


FLAVOURS: Any = {
    # settings: (names that guided-diffusion has, prefixes that it has not)
    "resblock_updown": (
        {"resblock_updown": True},
        ["input_blocks.2.0.out_layers.3.weight", "output_blocks.1.2.in_layers.2.bias"],
        ["input_blocks.2.0.op", "output_blocks.1.2.conv", "input_blocks.2.0.resample"],
    ),
    "conv_resample": (
        {},
        ["input_blocks.2.0.op.weight", "output_blocks.1.2.conv.bias"],
        ["input_blocks.2.0.in_layers", "output_blocks.1.2.in_layers"],
    ),
    "neither": (
        {"conv_resample": False},
        ["input_blocks.3.1.qkv.weight", "output_blocks.2.0.skip_connection.weight"],
        ["input_blocks.2.", "output_blocks.1.2.", "input_blocks.1.0.skip_connection"],
    ),
    "three blocks a level": (
        {"num_res_blocks": 3},
        [
            "input_blocks.4.0.op.weight",
            "input_blocks.7.1.qkv.weight",
            "output_blocks.3.2.conv.bias",
        ],
        ["input_blocks.8.", "output_blocks.8.", "output_blocks.4.1."],
    ),
    "unconditional": (
        {"conditioning": "none"},
        ["time_embed.0.weight", "time_embed.2.bias", "out.0.weight", "out.2.bias"],
        ["label_emb", "routing", "out.1"],
    ),
}


@pytest.mark.parametrize(("settings", "present", "absent"), FLAVOURS.values(), ids=FLAVOURS)
def test_names_are_those_of_guided_diffusion(settings, present, absent):
    with torch.device("meta"):
        names = list(ADM(**TINY | settings, routing=DTR).state_dict())
    assert set(present) <= set(names)
    assert not [name for name in names if name.startswith(tuple(absent))]
    middle = [".".join(name.split(".")[1:3]) for name in names if name.startswith("middle_block")]
    layers = ["in_layers", "emb_layers", "out_layers"]
    assert list(dict.fromkeys(middle)) == [
        *(f"0.{layer}" for layer in layers),
        *("1.norm", "1.qkv", "1.proj_out"),
        *(f"2.{layer}" for layer in layers),
    ]


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("flavour", ["resblock_updown", "conv_resample", "neither"])
def test_every_flavour_runs(flavour, scale_shift):
    settings = FLAVOURS[flavour][0] | {"use_scale_shift_norm": scale_shift}
    model = tiny_adm(**settings, num_head_channels=16)
    assert [b.num_heads for b in model.blocks if isinstance(b, AttentionBlock)] == [4] * 4
    modulation = model.get_parameter("middle_block.0.emb_layers.1.weight")
    assert modulation.shape == (128 if scale_shift else 64, 128)
    out = model(*tiny_batch())
    assert out.shape == (3, 6, 8, 8)
    assert out.isfinite().all()


def num_parameters(**settings):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ADM(**settings).parameters())


def test_the_64x64_imagenet_network_has_the_published_296_million_parameters():
    assert num_parameters(**IMAGENET_64) == 295_904_454


def test_the_512x512_imagenet_network_has_the_published_559_million_parameters():
    larger = {
        "image_size": 512,
        "model_channels": 256,
        "num_res_blocks": 2,
        "attention_resolutions": [16, 32, 64],
        "channel_mult": [0.5, 1, 1, 2, 2, 4, 4],
    }
    assert num_parameters(**IMAGENET_64 | larger) / 1e6 == pytest.approx(559, abs=0.5)


def test_a_network_on_the_meta_device_has_shapes():
    with torch.device("meta"):
        model = ADM(**TINY, routing=DTR)
        x, t, y = torch.empty(3, 3, 8, 8), torch.zeros(3).long(), torch.zeros(3).long()
        assert model(x, t, y).shape == (3, 6, 8, 8)


def test_at_initialisation_blocks_are_their_skip_connections_and_the_output_is_zero():
    torch.manual_seed(0)
    model = ADM(**TINY, routing=DTR)
    assert not model(*tiny_batch()).any()
    x, emb = torch.randn(3, 64, 4, 4), torch.randn(3, 128)
    mask = torch.rand(3, 64) > 0.5
    first, between, _ = model.middle_block
    torch.testing.assert_close(first(x, emb, mask), x)
    torch.testing.assert_close(between(x, mask), x)


def test_the_null_label_is_the_row_after_the_classes():
    assert ADM(**TINY).label_emb.num_embeddings == 5
    model = tiny_adm(class_dropout_prob=0.1)
    assert model.null_label == model.num_classes == 5
    x, t, y = tiny_batch()
    assert model.null_like(y).tolist() == [5, 5, 5]
    null = model(x, t, model.null_like(y))
    assert not torch.allclose(null, model(x, t, y))


def test_an_unconditional_network_ignores_labels():
    model = tiny_adm(conditioning="none", class_dropout_prob=0.1)
    assert model.num_classes == 1
    assert model.class_dropout_prob == 0
    x, t, y = tiny_batch()
    assert torch.equal(model(x, t, y), model(x, t, model.null_like(y)))


def test_without_learned_sigma_the_output_has_the_input_channels():
    assert tiny_adm(learn_sigma=False)(*tiny_batch()).shape == (3, 3, 8, 8)


def test_in_bfloat16_the_weights_decide():
    model = released(routed=True)
    x, t, y = golden("x"), golden("t"), golden("y")
    expected = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t, y)
    out = model.bfloat16()(x, t, y)
    assert out.dtype == torch.bfloat16
    for low in (mixed, out):
        assert (low.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_an_empty_batch_gives_every_parameter_a_gradient_of_zero():
    model = tiny_adm(routing=DTR)
    x, t, y = tiny_batch()
    model(x[:0], t[:0], y[:0]).sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_attention_is_computed_by_the_backend_that_is_set():
    model = tiny_adm()
    model.use_attention("xformers")
    layers = [block for block in model.blocks if isinstance(block, AttentionBlock)]
    assert {layer.attention_backend for layer in layers} == {"xformers"}
    model.use_attention("sdpa")
    assert {layer.attention_backend for layer in layers} == {"sdpa"}


@pytest.mark.parametrize("new_order", [False, True])
def test_the_heads_of_a_query_lie_side_by_side(monkeypatch, new_order):
    """The compiled backward of xformers fails where q, k and v alternate in memory."""
    strides = []

    def look(q, k, v, backend):
        strides.extend((*x.stride()[-2:], x.shape[-1]) for x in (q, k, v))
        return attention(q, k, v, backend)

    monkeypatch.setattr(unet, "attention", look)
    tiny_adm(use_new_attention_order=new_order)(*tiny_batch())
    assert strides
    for between_heads, between_channels, head_dim in strides:
        assert (between_heads, between_channels) == (head_dim, 1)


# torch.compile looks at .grad of the features and hides its warning; as an error it cannot.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("routing", [None, DTR])
def test_a_block_is_one_graph_for_the_compiler(routing):
    model = tiny_adm(routing=routing, resblock_updown=True)
    expected = model(*tiny_batch())
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=64):  # one graph per shape of block
        torch.testing.assert_close(model(*tiny_batch()), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_channels": 33}, "model.model_channels = 33: .* give an even number"),
        (
            {"model_channels": 48},
            "model.model_channels = 48: .* is 48 channels, no multiple of .* 32; ch",
        ),
        ({"channel_mult": [1, 0.7]}, "0.7 of model.channel_mult is 22 channels"),
        ({"num_heads": 5}, "model.num_heads = 5: does not divide the 64 channels"),
        ({"num_heads": 0}, "model.num_heads = 0: does not divide"),
        ({"num_head_channels": 48}, "model.num_head_channels = 48: .* give a divisor of 64"),
        (
            {"image_size": 9},
            "model.image_size = 9: cannot be halved 1 times.* give a multiple of 2",
        ),
        (
            {"attention_resolutions": [8]},
            r"model.attention_resolutions = \[8\]: 8 .* give some of 1, 2",
        ),
        ({"routing": RoutingSpec("dtr", beta=0.02)}, "model.routing.beta = 0.02: leaves none"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        ADM(**TINY | settings)
