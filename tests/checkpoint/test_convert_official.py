"""Convert official layouts of DiT, DTR and ADM into networks of ours."""

import numpy as np
import pytest
import torch

from dtr_scale.checkpoint.convert import from_official, official_config
from dtr_scale.errors import CheckpointError, ConfigError
from dtr_scale.jobs.network import build_model
from dtr_scale.models.routing import routing_mask
from tests.support.weights import (
    ADM,
    CONFIG,
    GOLDEN,
    RELEASED,
    assert_same,
    dtr_masks,
    mask_name,
    random_network,
    released,
)


def test_released_dtr_weights_give_the_released_output():
    official = released(dtr_masks())
    config = official_config(official, "dtr", num_heads=4)
    assert config == CONFIG | {
        "learn_sigma": True, "routing": {"type": "dtr", "alpha": 4.0, "beta": 0.8}
    }  # fmt: skip
    network = build_model(config)
    network.load_state_dict(from_official(official, "dtr"))
    with torch.no_grad():
        # In fp64: the released numbers' own rounding is 1.2e-5, another CPU's comes on top.
        out = network.double()(*(torch.tensor(RELEASED[name]) for name in ("x", "t", "y")))
    assert (out - torch.tensor(RELEASED["out"])).abs().max() <= 1.3e-5 * out.abs().max()


def test_official_dit_weights_fit_an_unrouted_network():
    weights = from_official(released(), "dit")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert "pos_embed" not in weights
    build_model(CONFIG).load_state_dict(weights)
    assert official_config(released(), "dit", num_heads=4) == CONFIG | {
        "learn_sigma": True, "routing": {"type": "none"}
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrapped", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "blocks"]
)
def test_names_of_wrappers_are_removed(wrapped):
    official = released(dtr_masks())
    if wrapped == "blocks":  # each block compiled by itself
        named = {
            ".".join(
                [*name.split(".")[:2], "_orig_mod", *name.split(".")[2:]]
                if name.startswith("blocks.")
                else [name]
            ): value
            for name, value in official.items()
        }
    else:
        named = {wrapped.format(name): value for name, value in official.items()}
    assert_same(from_official(named, "dtr"), from_official(official, "dtr"))


@pytest.mark.parametrize(
    ("hidden_size", "num_heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)]
)
def test_the_heads_of_a_variant_follow_from_its_width(exported, hidden_size, num_heads):
    config = CONFIG | {"hidden_size": hidden_size, "depth": 1, "patch_size": 4}
    official = exported(build_model(config).state_dict(), config)
    assert official_config(official)["num_heads"] == num_heads


def test_other_sizes_need_their_number_of_heads():
    with pytest.raises(ConfigError, match=r"heads is not in the weights \(hidden size 64\); give"):
        official_config(released())
    with pytest.raises(ConfigError, match="number of heads = 5 is no divisor"):
        official_config(released(), num_heads=5)


@pytest.mark.parametrize(
    "case", ["T1000_C384_a4.0_b0.8", "T1000_C768_a1.0_b0.8", "T250_C64_a2.0_b0.6"]
)
def test_released_masks_tell_their_alpha_and_beta(exported, case):
    golden = np.load(GOLDEN / "masks_dtr.npz")
    start, active = torch.tensor(golden[f"{case}_start"]), torch.tensor(golden[f"{case}_active"])
    num_channels, alpha, beta = (float(part[1:]) for part in case.split("_")[1:])
    c = torch.arange(int(num_channels))
    mask = (c >= start[:, None]) & (c < (start + active)[:, None])
    config = CONFIG | {"hidden_size": int(num_channels), "depth": 2}
    official = exported(random_network(config).state_dict(), config)
    official |= {mask_name(i): mask.float() for i in range(2)}
    routing = official_config(official, "dtr", num_heads=4)["routing"]
    assert routing == {"type": "dtr", "alpha": alpha, "beta": beta}


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5, 4.0, 7.25])
@pytest.mark.parametrize("beta", [1 / 64, 1 / 3, 0.5, 0.77, 63 / 64, 1.0])
def test_any_alpha_and_beta_are_told_up_to_the_masks_they_make(alpha, beta):
    mask = dtr_masks(alpha=alpha, beta=beta)
    routing = official_config(released(mask), "dtr", num_heads=4)["routing"]
    assert routing.pop("type") == "dtr"
    assert torch.equal(dtr_masks(**routing), mask)


def test_random_masks_stay_with_the_weights():
    masks = [routing_mask("random", 1000, 64, seed=5, block=block) for block in range(3)]
    weights = from_official(released(masks), "dtr")
    config = official_config(released(masks), "dtr", num_heads=4)
    assert config["routing"] == {"type": "random"}
    network = build_model(config)
    network.load_state_dict(weights)
    for block, mask in enumerate(masks):
        assert torch.equal(network.get_buffer(f"routing.mask_{block}"), mask)
    # The masks are used: the same weights with other masks make another network.
    other = build_model(config)
    other.load_state_dict(weights | {"routing.mask_0": masks[1]})
    inputs = [torch.tensor(RELEASED[name]) for name in ("x", "t", "y")]
    with torch.no_grad():
        assert not torch.allclose(network(*inputs), other(*inputs))


@pytest.mark.parametrize("kind", ["dtr_eq4", "cdtr", "ercddt"])
def test_masks_of_no_dtr_are_kept_even_if_all_blocks_share_them(kind):
    mask = routing_mask(kind, 1000, 64)
    assert torch.equal(from_official(released(mask), "dtr")["routing.mask_2"], mask)


def test_unconditional_weights_have_one_label(exported):
    config = CONFIG | {"conditioning": "none"}
    official = exported(random_network(config).state_dict(), config)
    assert official_config(official, num_heads=4)["conditioning"] == "none"
    build_model(official_config(official, num_heads=4)).load_state_dict(from_official(official))


def test_positions_may_have_drifted_in_the_average_but_not_be_others():
    official = released()
    official["pos_embed"] = official["pos_embed"].half() + 1e-3
    assert from_official(official)
    official["pos_embed"] = official["pos_embed"].flip(1)
    with pytest.raises(CheckpointError, match=r"pos_embed \[1, 16, 64\] is not DiT's fixed table"):
        from_official(official)
    official["pos_embed"] = torch.zeros(1, 15, 64)
    with pytest.raises(CheckpointError, match=r"pos_embed \[1, 15, 64\] belongs to no square grid"):
        from_official(official)
    official["pos_embed"] = torch.full((1, 16, 64), float("nan"))
    with pytest.raises(CheckpointError, match="differs by nan"):
        from_official(official)


def without(name):
    return {key: value for key, value in released(dtr_masks()).items() if key != name}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (without("blocks.1.attn.qkv.bias"), "missing blocks.1.attn.qkv.bias; wrong kind or file"),
        (without("pos_embed"), "pos_embed is missing"),
        (without(mask_name(2)), r"blocks.2.routing._unit_mapping is no mask .* \[1000, 64\]"),
        (released(dtr_masks() * 0.5), "is no mask of zeros and ones"),
        (released(dtr_masks()[:, :32]), r"is no mask of zeros and ones \[1000, 64\]"),
        (released(dtr_masks()[0]), r"is no mask of zeros and ones \[64, 64\]"),
        (released(dtr_masks()) | {"extra.a": torch.ones(1)}, "unexpected extra.a; wrong kind"),
        (
            released(dtr_masks()) | {f"e{i}": torch.ones(1) for i in range(5)},
            "unexpected e0, e1, e2 and 2 more",
        ),
        (
            released(dtr_masks()) | {"blocks.0.mlp.fc1.bias": torch.ones(8)},
            r"misshapen blocks.0.mlp.fc1.bias \[8\] \(expected \[256\]\)",
        ),
        (
            released(dtr_masks()) | {"x_embedder.proj.weight": torch.ones(64, 16)},
            r"x_embedder.proj.weight is \[64, 16\], a DiT's has 4 axes",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, message):
    with pytest.raises(CheckpointError, match=message):
        from_official(weights, "dtr")


@pytest.mark.parametrize(
    ("weights", "kind", "found"),
    [
        (released(dtr_masks()), "dit", "dtr"),
        (released(), "adm", "dit"),
        (build_model(ADM).state_dict(), "dit", "adm"),
        (released(), "unet", "dit"),
        ({"a.weight": torch.ones(2)}, "unet", "unknown"),
    ],
)
def test_a_wrong_kind_is_told_from_the_right_one(weights, kind, found):
    message = f"kind '{kind}' does not fit these weights, which are {found}; accepted: dit, dtr"
    with pytest.raises(ConfigError, match=message):
        from_official(weights, kind)


def test_weights_of_dtr_may_come_without_masks():
    assert_same(from_official(released(), "dtr"), from_official(released(dtr_masks()), "dtr"))


def test_other_weights_are_named():
    with pytest.raises(CheckpointError, match=r"unexpected a\.weight: not the names of 'dit'"):
        from_official({"a.weight": torch.ones(2)}, "dit")
    with pytest.raises(CheckpointError, match=r"unexpected extra\.a: not the names of 'adm'"):
        from_official(build_model(ADM).state_dict() | {"extra.a": torch.ones(1)}, "adm")


def test_adm_weights_keep_their_names():
    network = random_network(ADM)
    official = {f"module.{name}": value.half() for name, value in network.state_dict().items()}
    weights = from_official(official, "adm")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    build_model(ADM).load_state_dict(weights)
