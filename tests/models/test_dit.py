import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtr_scale.models.dit import VARIANTS, DiT, DiTBlock

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dtr_dit_forward.npz")
TINY: Any = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "input_size": 4}


def golden(name):
    return torch.tensor(GOLDEN[name])


def assert_close(actual, expected):
    """Equal to 1e-5 of the largest value."""
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def tiny_dit(**settings):
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
    """The released code's small network with its weights."""
    model = DiT(**json.loads(str(GOLDEN["config"])), routing="dtr")
    weights = {name[2:]: golden(name).float() for name in GOLDEN.files if name.startswith("w.")}
    weights.pop("pos_embed")
    model.load_state_dict(weights)  # strict: the names are the released ones
    return model


def test_forward_equals_the_released_code(released):
    with torch.no_grad():
        assert_close(released(golden("x"), golden("t"), golden("y")), golden("out"))


def test_gradients_equal_the_released_code(released):
    x = golden("x").requires_grad_()
    released.zero_grad()
    released(x, golden("t"), golden("y")).square().mean().backward()
    assert x.grad is not None
    assert_close(x.grad, golden("grad_x"))
    names = [name.removeprefix("grad.") for name in GOLDEN.files if name.startswith("grad.")]
    assert len(names) == 5
    for name in names:
        assert_close(released.get_parameter(name).grad, golden(f"grad.{name}"))


def test_equation_4_is_another_network(released):
    config = json.loads(str(GOLDEN["config"]))
    model = DiT(**config, routing="dtr_eq4")
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
        model = DiT(**TINY, routing="dtr")
        x, t, y = torch.empty(3, 4, 4, 4), torch.zeros(3).long(), torch.zeros(3).long()
        assert model(x, t, y).shape == (3, 8, 4, 4)


def test_at_initialisation_blocks_are_the_identity_and_the_output_is_zero():
    torch.manual_seed(0)
    model = DiT(**TINY, num_classes=5, routing="dtr")
    assert not model(*tiny_batch()).any()
    z, c = torch.randn(3, 4, 32), torch.randn(3, 32)
    mask = torch.rand(3, 1, 32) > 0.5
    torch.testing.assert_close(model.blocks[0](z, c, mask, "sdpa"), z)


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


def test_idle_channels_bypass_a_routed_block():
    torch.manual_seed(0)
    block = DiTBlock(hidden_size=16, num_heads=2, mlp_ratio=4.0)
    z, c, mask = torch.randn(2, 5, 16), torch.randn(2, 16), torch.rand(2, 1, 16) > 0.4
    nudge = ~mask * torch.randn(2, 5, 16)
    out = block(z, c, mask, "sdpa")
    torch.testing.assert_close(block(z + nudge, c, mask, "sdpa"), out + nudge)
    every = torch.ones_like(mask)
    torch.testing.assert_close(block(z, c, every, "sdpa"), block(z, c, None, "sdpa"))


def test_each_sample_is_routed_by_its_own_timestep():
    model = tiny_dit(routing="dtr")
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
    model = tiny_dit(routing="dtr")
    expected = model(*tiny_batch())
    model.bfloat16()
    out = model(*tiny_batch())
    assert out.dtype == torch.bfloat16
    assert model.mask_start.dtype == model.mask_stop.dtype == torch.int64
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = tiny_dit(routing="dtr")
        model.activation_checkpointing = recompute
        model(*tiny_batch()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


# torch.compile looks at .grad of the tokens and hides its warning; as an error it cannot.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_block_is_one_graph_for_the_compiler():
    model = tiny_dit(routing="dtr")
    expected = model(*tiny_batch())
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(*tiny_batch()), expected)


def test_tables_are_not_part_of_the_state():
    buffers = {name for name, _ in tiny_dit(routing="dtr").named_buffers()}
    assert buffers == {"pos_embed", "mask_start", "mask_stop"}
    assert not buffers & tiny_dit(routing="dtr").state_dict().keys()
