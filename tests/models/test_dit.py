import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtr_scale.errors import ConfigError
from dtr_scale.models.dit import VARIANTS, Attention, CrossAttention, DiT, DiTBlock
from dtr_scale.models.routing import RoutingSpec

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dtr_dit_forward.npz")
TINY: Any = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "input_size": 4}


DTR = RoutingSpec("dtr")


def released_config(routing):
    config = json.loads(str(GOLDEN["config"]))
    window = {key: config.pop(key) for key in ("alpha", "beta")}
    return config | {"routing": RoutingSpec(routing, **window)}


def golden(name):
    return torch.tensor(GOLDEN[name])


def assert_close(actual, expected, tolerance=1e-5):
    """Equal to a share of the largest value."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def tiny_dit(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = DiT(**TINY, num_classes=5, **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_batch():
    torch.manual_seed(1)
    return torch.randn(3, 4, 4, 4), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])


@pytest.fixture(scope="module")
def released():
    """The released code's small network with its weights, in fp64.

    So the distances are those of the released numbers from exact arithmetic, the same on every CPU:
    they were made in fp32, whose rounding this network's gradients amplify.
    """
    model = DiT(**released_config("dtr"))
    weights = {name[2:]: golden(name).float() for name in GOLDEN.files if name.startswith("w.")}
    weights.pop("pos_embed")
    model.load_state_dict(weights)  # strict: the names are the released ones
    return model.double()


def test_forward_equals_the_released_code(released):
    with torch.no_grad():
        out = released(golden("x"), golden("t"), golden("y"))
        assert_close(out, golden("out"), 1.3e-5)
        in_fp32 = deepcopy(released).float()(golden("x"), golden("t"), golden("y"))
        assert_close(in_fp32.double(), out)


def test_gradients_equal_the_released_code(released):
    x = golden("x").double().requires_grad_()
    released.zero_grad()
    released(x, golden("t"), golden("y")).square().mean().backward()
    assert x.grad is not None
    assert_close(x.grad, golden("grad_x"), 1.5e-4)
    names = [name.removeprefix("grad.") for name in GOLDEN.files if name.startswith("grad.")]
    assert len(names) == 5
    for name in names:
        assert_close(released.get_parameter(name).grad, golden(f"grad.{name}"), 1.5e-4)


def test_equation_4_is_another_network(released):
    model = DiT(**released_config("dtr_eq4"))
    model.load_state_dict(released.state_dict())
    with torch.no_grad():
        out = model(golden("x"), golden("t"), golden("y"))
    assert (out - golden("out")).abs().max() > 1e-3


@pytest.mark.parametrize(("letter", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_have_the_published_parameter_counts(letter, millions):
    size = VARIANTS[f"DiT-{letter}/2"]
    with torch.device("meta"):
        model = DiT(**size._asdict(), input_size=32)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


def test_a_network_on_the_meta_device_has_shapes():
    with torch.device("meta"):
        model = DiT(**TINY, routing=DTR)
        x, t, y = torch.empty(3, 4, 4, 4), torch.zeros(3).long(), torch.zeros(3).long()
        assert model(x, t, y).shape == (3, 8, 4, 4)


def test_at_initialisation_blocks_are_the_identity_and_the_output_is_zero():
    torch.manual_seed(0)
    model = DiT(**TINY, num_classes=5, routing=DTR)
    assert not model(*tiny_batch()).any()
    z, c = torch.randn(3, 4, 32), torch.randn(3, 32)
    mask = torch.rand(3, 32) > 0.5
    torch.testing.assert_close(model.blocks[0](z, c, None, mask), z)


def test_initial_weights_have_the_spread_of_dit():
    torch.manual_seed(0)
    model = DiT(hidden_size=64, depth=1, num_heads=2, patch_size=2, input_size=4)
    spreads = {
        "x_embedder.proj.weight": (2 / (4 * 2 * 2 + 64)) ** 0.5,
        "blocks.0.attn.qkv.weight": (2 / (64 + 192)) ** 0.5,
        "blocks.0.mlp.fc1.weight": (2 / (64 + 256)) ** 0.5,
        "y_embedder.embedding_table.weight": 0.02,
        "t_embedder.mlp.0.weight": 0.02,
        "t_embedder.mlp.2.weight": 0.02,
    }
    for name, spread in spreads.items():
        assert model.get_parameter(name).std().item() == pytest.approx(spread, rel=0.1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name


@pytest.mark.parametrize("context_dim", [None, 12])
def test_idle_channels_bypass_a_routed_block(context_dim):
    torch.manual_seed(0)
    block = DiTBlock(hidden_size=16, num_heads=2, context_dim=context_dim)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    z, c, mask = torch.randn(2, 5, 16), torch.randn(2, 16), torch.rand(2, 16) > 0.4
    context = None if context_dim is None else torch.randn(2, 7, context_dim)
    nudge = ~mask[:, None] * torch.randn(2, 5, 16)
    out = block(z, c, context, mask)
    torch.testing.assert_close(block(z + nudge, c, context, mask), out + nudge)
    every = block(z, c, context, torch.ones_like(mask))
    torch.testing.assert_close(every, block(z, c, context, None))
    # eq. 8, from the block without a mask
    masked = block(mask[:, None] * z, c, context, None)
    torch.testing.assert_close(out, ~mask[:, None] * z + masked)


def test_each_sample_is_routed_by_its_own_timestep():
    model = tiny_dit(routing=DTR)
    x, t, y = tiny_batch()
    together = model(x, t, y)
    for n in range(3):
        torch.testing.assert_close(model(x[n : n + 1], t[n : n + 1], y[n : n + 1])[0], together[n])


def test_the_null_label_is_the_row_after_the_classes():
    model = tiny_dit()
    assert model.null_label == model.num_classes == 5
    x, t, y = tiny_batch()
    null = model(x, t, torch.full_like(y, model.null_label))
    assert not torch.allclose(null[0], model(x, t, y)[0])
    torch.testing.assert_close(null[2], model(x, t, y)[2])


def test_without_learned_sigma_the_output_has_the_input_channels():
    assert tiny_dit(learn_sigma=False)(*tiny_batch()).shape == (3, 4, 4, 4)


def test_in_bfloat16_the_weights_decide_and_tables_stay_whole():
    model = tiny_dit(routing=DTR)
    expected = model(*tiny_batch())
    model.bfloat16()
    out = model(*tiny_batch())
    assert out.dtype == torch.bfloat16
    assert {table.dtype for table in model.routing.buffers()} == {torch.int64}
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_each_block_reads_its_tokens_side_by_side():
    """Strides of the first tokens go through the whole network, and cost a copy at each read."""
    model, tokens = tiny_dit(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, inputs: tokens.append(inputs[0]))
    model(*tiny_batch())
    assert len(tokens) == len(model.blocks)
    assert all(each.is_contiguous() for each in tokens)


@pytest.mark.parametrize("text", [False, True])
def test_attention_is_computed_by_the_backend_that_is_set(text):
    model = tiny_dit(**(TEXT if text else {}))
    model.use_attention("xformers")
    layers = [m for m in model.modules() if isinstance(m, Attention | CrossAttention)]
    assert len(layers) == (4 if text else 2)
    assert {layer.attention_backend for layer in layers} == {"xformers"}
    model.use_attention("sdpa")
    assert {layer.attention_backend for layer in layers} == {"sdpa"}


# torch.compile looks at .grad of the tokens and hides its warning; as an error it cannot.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_block_is_one_graph_for_the_compiler():
    model = tiny_dit(routing=DTR)
    expected = model(*tiny_batch())
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(*tiny_batch()), expected)


@pytest.mark.parametrize("kind", ["dtr", "cdtr", "ercddt", "max_roaming"])
def test_tables_are_not_part_of_the_state(kind):
    model = tiny_dit(routing=RoutingSpec(kind))
    assert len(list(model.buffers())) > 1
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_the_masks_of_random_routing_are_part_of_the_state():
    model = tiny_dit(routing=RoutingSpec("random"))
    masks = {name for name in model.state_dict() if name.startswith("routing.")}
    assert masks == {"routing.mask_0", "routing.mask_1"}
    other = tiny_dit(routing=RoutingSpec("random", seed=1))
    assert not torch.equal(other(*tiny_batch()), model(*tiny_batch()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*tiny_batch()), model(*tiny_batch()))


def test_masks_that_roam_follow_the_step():
    model = tiny_dit(routing=RoutingSpec("max_roaming", update_every_steps=10))
    outputs = [model(*tiny_batch(), step=step) for step in (0, 9, 10, 10_000, 20_000)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    assert torch.equal(outputs[3], outputs[4])  # every channel was visited long ago
    with pytest.raises(ConfigError, match=r"max_roaming.*step="):
        model(*tiny_batch())


TEXT: Any = {"conditioning": "text", "context_length": 7, "context_dim": 12}


def text_batch():
    x, t, _ = tiny_batch()
    return x, t, torch.randn(3, 7, 12)


def test_with_text_blocks_start_as_the_identity_and_the_timestep_alone_modulates():
    torch.manual_seed(0)
    model: Any = DiT(**TINY, **TEXT, routing=DTR)
    assert not model(*text_batch()).any()
    z, c, context = torch.randn(3, 4, 32), torch.randn(3, 32), torch.randn(3, 7, 12)
    torch.testing.assert_close(model.blocks[0](z, c, context, None), z)
    assert {name for name, _ in model.y_embedder.named_parameters()} == {"null_tokens"}
    assert model.blocks[0].adaLN_modulation[1].out_features == 9 * 32
    assert model.blocks[0].cross_attn.kv.in_features == 12


def test_text_reaches_the_output_by_cross_attention_alone():
    model = tiny_dit(**TEXT)
    x, t, y = text_batch()
    out = model(x, t, y)
    assert out.shape == (3, 8, 4, 4)
    assert not torch.allclose(model(x, t, y + 1), out)
    order = torch.randperm(7)
    torch.testing.assert_close(model(x, t, y[:, order]), out)  # keys and values are a set
    for block in model.blocks:
        torch.nn.init.zeros_(block.cross_attn.proj.weight)
    torch.testing.assert_close(model(x, t, y + 1), model(x, t, y))


def test_zero_tokens_are_the_learned_null_text():
    model = tiny_dit(**TEXT)
    x, t, y = text_batch()
    null = model(x, t, model.null_like(y))
    torch.testing.assert_close(null, model(x, t, model.y_embedder.null_tokens.expand_as(y)))
    y[1] = 0
    mixed = model(x, t, y)
    torch.testing.assert_close(mixed[1], null[1])
    assert not torch.allclose(mixed[0], null[0])
    mixed.square().mean().backward()
    assert model.y_embedder.null_tokens.grad.any()


def test_without_label_dropout_there_is_no_null_text():
    model = tiny_dit(**TEXT, class_dropout_prob=0.0)
    assert not list(model.y_embedder.parameters())
    assert model(*text_batch()).shape == (3, 8, 4, 4)


def test_conditioning_none_has_one_class():
    model = tiny_dit(conditioning="none")
    assert (model.num_classes, model.class_dropout_prob) == (1, 0.0)
    assert model.y_embedder.embedding_table.num_embeddings == 1


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_normalised_queries_and_keys_bound_attention(conditioning):
    """However large their weights are, no score exceeds sqrt(head_dim)."""
    torch.manual_seed(0)
    layers = (
        [Attention(32, 2, qk_norm=True)]
        if conditioning == "class"
        else [CrossAttention(32, 2, 12, qk_norm=True)]
    )
    x, context = torch.randn(3, 5, 32), torch.randn(3, 7, 12)
    for layer in layers:
        inputs = (x,) if conditioning == "class" else (x, context)
        small = layer(*inputs)
        for name, parameter in layer.named_parameters():
            if name in ("qkv.weight", "qkv.bias", "q.weight", "q.bias"):
                with torch.no_grad():
                    parameter[:32].mul_(1e4)
        torch.testing.assert_close(layer(*inputs), small, rtol=1e-3, atol=1e-4)
        assert layer.q_norm.weight.shape == layer.k_norm.weight.shape == (16,)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_a_network_with_qk_norm_trains_in_bf16(precision):
    model, plain = tiny_dit(qk_norm=True, routing=DTR), tiny_dit(routing=DTR)
    added = model.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"blocks.{k}.attn.{n}_norm.weight" for k in range(2) for n in "qk"}
    if precision == "bf16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        model(*tiny_batch()).float().square().mean().backward()
    for name in added:
        assert model.get_parameter(name).grad.abs().max() > 0
