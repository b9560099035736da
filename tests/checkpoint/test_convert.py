"""Official weights in, official and diffusers layouts out, and files that are not to be trusted."""

import argparse
import json
import os
import pickle
import runpy
import sys
import types
import typing
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dtr_scale.checkpoint.convert import (
    convert_network,
    export_diffusers,
    export_dit,
    from_official,
    load_official,
    official_config,
)
from dtr_scale.checkpoint.weights import read_weights
from dtr_scale.cli.main import main
from dtr_scale.errors import CheckpointError, ConfigError
from dtr_scale.jobs.trained import load_run
from dtr_scale.models.build import build_model
from dtr_scale.models.routing import routing_mask
from tests.support.runs import train

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


@pytest.fixture
def exported(tmp_path):
    """Weights of ours as the official state dict that `export_dit` makes of them."""

    def export(state_dict, config, num_timesteps=1000):
        export_dit(state_dict, config, tmp_path / "exported.safetensors", num_timesteps)
        return load_file(tmp_path / "exported.safetensors")

    return export


# From official layouts


def test_released_dtr_weights_give_the_released_output():
    official = released(dtr_masks())
    config = official_config(official, "dtr", num_heads=4)
    assert config == CONFIG | {
        "learn_sigma": True, "routing": {"type": "dtr", "alpha": 4.0, "beta": 0.8}
    }  # fmt: skip
    network = build_model(config)
    network.load_state_dict(from_official(official, "dtr"))
    with torch.no_grad():
        out = network(*(torch.tensor(RELEASED[name]) for name in ("x", "t", "y")))
    assert (out - torch.tensor(RELEASED["out"])).abs().max() <= 1e-5 * out.abs().max()


def test_official_dit_weights_fit_an_unrouted_network():
    weights = from_official(released(), "dit")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert "pos_embed" not in weights
    build_model(CONFIG).load_state_dict(weights)
    assert official_config(released(), "dit", num_heads=4) == CONFIG | {
        "learn_sigma": True, "routing": {"type": "none"}
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrapped",
    ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "blocks"],
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


def test_masks_that_share_memory_are_written(tmp_path):
    mask = dtr_masks().float()
    weights = released() | {mask_name(i): mask for i in range(3)}
    torch.save(weights, tmp_path / "weights.pt")
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "weights.pt"), "--from", "dtr", "--to", "safetensors",
                 "--out", str(out)]) == 0  # fmt: skip
    assert_same(load_file(out), {name: value.float() for name, value in weights.items()})


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


# Files


class DictConfig:
    """Looks like OmegaConf's in a pickle; if it were ever loaded, it would tell."""

    def __init__(self):
        self.state = {
            "_metadata": Metadata(),
            "_content": {"image_size": AnyNode(), "name": "DiT-S/2"},
            "_parent": self,
        }

    def __getstate__(self):
        return self.state

    def __setstate__(self, state):
        raise AssertionError("loaded")


class Metadata:
    def __init__(self):
        self.ref_type, self.object_type = typing.Any, dict
        self.resolver_cache = defaultdict(dict)


class AnyNode:
    def __init__(self):
        self.value = 256


@pytest.fixture
def omegaconf(monkeypatch):
    """A stand-in for the library that the authors' checkpoints need and we do not install."""
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    for module, own in (("dictconfig", DictConfig), ("base", Metadata), ("nodes", AnyNode)):
        name = f"omegaconf.{module}"
        holder = types.ModuleType(name)
        holder.__dict__[own.__name__] = own
        monkeypatch.setattr(own, "__module__", name)
        monkeypatch.setitem(sys.modules, name, holder)
    return DictConfig


WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}
AVERAGED = {name: -value for name, value in WEIGHTS.items()}


def checkpoint(**extra):
    return {"model": WEIGHTS, "ema": AVERAGED, "opt": {"state": {0: {"step": 3}}}, **extra}


@pytest.fixture
def saved(tmp_path):
    def save(content, **options):
        torch.save(content, tmp_path / "weights.pt", **options)
        return tmp_path / "weights.pt"

    return save


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_weights_are_found_bare_or_in_a_checkpoint(saved, options):
    assert_same(read_weights(saved(WEIGHTS, **options)), WEIGHTS)
    path = saved(checkpoint(args=argparse.Namespace(model="DiT-XL/2", epochs=1400)), **options)
    assert_same(read_weights(path), AVERAGED)
    assert_same(read_weights(path, "model"), WEIGHTS)
    assert_same(read_weights(saved({"model": WEIGHTS}, **options)), WEIGHTS)
    with pytest.raises(CheckpointError, match="holds no 'model', only averaged weights"):
        read_weights(saved({"ema": WEIGHTS}, **options), "model")


def test_a_released_dtr_checkpoint_is_read_with_its_config_left_inert(saved, omegaconf):
    path = saved(checkpoint(config=omegaconf(), uw={"log_var": torch.zeros(8)}))
    for name in list(sys.modules):
        if name.startswith("omegaconf"):
            del sys.modules[name]
    assert_same(read_weights(path), AVERAGED)


def test_safetensors_are_read(tmp_path):
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    assert_same(read_weights(tmp_path / "weights.safetensors"), WEIGHTS)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        read_weights(tmp_path / "cut.safetensors")


class Hostile:
    """Runs a function when it is unpickled by what runs functions."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle", "protocol 4"])
@pytest.mark.parametrize("function", ["os.system", "eval", "exec", "getattr", "runpy.run_path"])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, saved, container, function):
    marker, script = tmp_path / "executed", tmp_path / "script.py"
    script.write_text(f"open({str(marker)!r}, 'w')")
    hostile = {
        "os.system": Hostile(os.system, f"touch {marker}"),
        "eval": Hostile(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Hostile(exec, f"open({str(marker)!r}, 'w')"),
        "getattr": Hostile(getattr, argparse.Namespace(a=1), "a"),
        "runpy.run_path": Hostile(runpy.run_path, str(script)),
    }[function]
    content = checkpoint(args=hostile)
    path = tmp_path / "weights.pt"
    if container in ("zip", "legacy"):
        saved(content, _use_new_zipfile_serialization=container == "zip")
    else:
        path.write_bytes(pickle.dumps({"ema": hostile}, protocol=2 if container == "pickle" else 4))
    with pytest.raises(CheckpointError) as refusal:
        read_weights(path)
    (line,) = str(refusal.value).splitlines()
    assert str(path) in line
    if container != "protocol 4":  # whose opcodes are refused before the name is
        assert f"names {function.replace('os.', os.name + '.')}, which is no part of" in line
    assert not marker.exists()
    if function == "os.system":  # it is hostile indeed
        pickle.loads(pickle.dumps(hostile))
        assert marker.exists()


def test_no_stand_in_can_be_made_to_call_anything(tmp_path):
    """BUILD, REDUCE, NEWOBJ and SETITEM on a stand-in do nothing; no attribute can be named."""
    marker = tmp_path / "executed"
    stand_in, system = b"cargparse\nNamespace\n", b"cposix\nsystem\n"
    command = b"X" + len(f"touch {marker}").to_bytes(4, "little") + f"touch {marker}".encode()
    for attack in (
        stand_in + b")\x81" + command + b"b.",  # BUILD with a string
        stand_in + command + b"\x85R.",  # REDUCE with an argument
        stand_in + b")R}" + command + system + b"sb.",  # BUILD with a function in the state
        stand_in + b")R" + command + command + b"s.",  # SETITEM
        stand_in + b")R" + command + b"a.",  # APPEND
        b"cargparse\nNamespace.__init__\n)R.",
        b"comegaconf.base\nMetadata.__class__\n)R.",
        b"comegaconf\nOmegaConf\n)R.",
    ):
        (tmp_path / "weights.pt").write_bytes(b"\x80\x02" + attack)
        with pytest.raises(CheckpointError):
            read_weights(tmp_path / "weights.pt")
    assert not marker.exists()


def test_damaged_files_are_refused(saved, tmp_path):
    path = saved(checkpoint(args=argparse.Namespace(a=1)))
    whole = path.read_bytes()
    for size in (0, 1, 10, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is damaged, cut off or not written by torch"):
            read_weights(path)
    for content in (b"not a pickle", b"\x80\x02", os.urandom(300)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged, cut off or not written by torch"):
            read_weights(path)
    for missing in (tmp_path / "no.pt", tmp_path / "no.safetensors"):
        with pytest.raises(CheckpointError, match=r"cannot read .*No such file"):
            read_weights(missing)
    with pytest.raises(CheckpointError, match=r"cannot read .*directory"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1, 2], "a list"),
        ({}, "a dict of nothing"),
        ({"ema": None}, "a NoneType"),
        ({"ema": {}}, "a dict of nothing"),
        ({"a": 1}, "'a' is a int"),
        ({1: torch.ones(1)}, "1 is a Tensor"),
        ({"epoch": 3, "state_dict": WEIGHTS}, "'epoch' is a int"),
    ],
)
def test_a_file_without_weights_is_refused(saved, content, found):
    with pytest.raises(CheckpointError, match=f"holds no weights by name: {found}; accepted"):
        read_weights(saved(content))


# To official layouts


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
    (CONFIG | {"routing": {"type": "max_roaming"}}, "'max_roaming' has other masks at every"),
]


@pytest.mark.parametrize(("config", "reason"), UNFIT)
def test_what_has_no_official_layout_is_refused_or_keeps_our_names(tmp_path, config, reason):
    weights = random_network(config).state_dict()
    with pytest.raises(ConfigError, match=f"{reason}.*official layout cannot hold"):
        export_dit(weights, config, tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match=f"{reason}.*diffusers' DiT cannot hold"):
        export_diffusers(weights, config, tmp_path / "out")
    convert_network(weights, config, "safetensors", tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), weights)


def test_what_is_written_can_be_read_by_whom_other_files_can(tmp_path):
    (tmp_path / "other").touch()
    export_diffusers(random_network(CONFIG).state_dict(), CONFIG, tmp_path)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    names = {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "other"}
    assert modes.keys() == names
    assert len(set(modes.values())) == 1


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


# To diffusers


def load_diffusers(folder):
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    loaded: Any = DiTTransformer2DModel.from_pretrained(
        folder, output_loading_info=True, low_cpu_mem_usage=False
    )
    model, info = loaded
    assert not any(info.values()), info
    return model.eval()


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


# The command


def refused(capsys, *arguments):
    assert main(["convert", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("error: ")
    return line


def test_the_command_converts_official_files(tmp_path, saved, capsys):
    path = saved(checkpoint() | {"ema": {f"module.{k}": v for k, v in released().items()}})
    to_file = ["--from", "dit", "--to", "safetensors", "--out", f"{tmp_path}/a.safetensors"]
    assert main(["convert", str(path), *to_file]) == 0
    assert capsys.readouterr() == (f"{tmp_path}/a.safetensors\n", "")
    official = {name: value.float() for name, value in released().items()}
    assert_same(load_file(tmp_path / "a.safetensors"), official)

    to_folder = ["--from", "dit", "--to", "diffusers", "--out", f"{tmp_path}/b"]
    assert "give it by --num-heads" in refused(capsys, tmp_path / "a.safetensors", *to_folder)
    arguments = [f"{tmp_path}/a.safetensors", *to_folder, "--num-heads", "4"]
    assert main(["convert", *arguments]) == 0
    assert load_diffusers(tmp_path / "b").config["num_attention_heads"] == 4


def test_the_command_keeps_the_masks_of_dtr(tmp_path, saved):
    official = released(dtr_masks())
    arguments = ["--from", "dtr", "--to", "safetensors", "--out", f"{tmp_path}/a.safetensors"]
    assert main(["convert", str(saved(official)), *arguments]) == 0
    written = read_weights(tmp_path / "a.safetensors")
    assert_same(from_official(written, "dtr"), from_official(official, "dtr"))
    assert torch.equal(written[mask_name(2)], dtr_masks().float())


def test_the_command_refuses_in_one_line(tmp_path, saved, capsys):
    path, out = saved(released(dtr_masks())), ["--out", tmp_path / "out"]
    file, folder = ["--to", "safetensors", *out], ["--to", "diffusers", *out]
    assert "kind 'dit' does not fit" in refused(capsys, path, "--from", "dit", *file)
    heads = ["--num-heads", 4]
    assert "has no masks" in refused(capsys, path, "--from", "dtr", *folder, *heads)
    adm = saved(build_model(ADM).state_dict())
    assert "'adm' is no DiT" in refused(capsys, adm, "--from", "adm", *folder)
    assert "No such file" in refused(capsys, tmp_path / "no.pt", "--from", "dit", *file)
    assert "is no run directory" in refused(capsys, tmp_path, "--from", "run", *file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["none", "random", "dtr"])
def test_the_command_converts_a_run(digits, tmp_path, capsys, kind):
    run = tmp_path / "run"
    small = ("--train.max_steps=2", f"--model.routing.type={kind}", "--train.ema_decay=0.5")
    assert train(digits, run, *small) == 0
    capsys.readouterr()
    out = ["--out", f"{tmp_path}/a.safetensors"]
    assert main(["convert", str(run), "--from", "run", "--to", "safetensors", *out]) == 0
    network = load_run(run).network
    official = read_weights(tmp_path / "a.safetensors")
    weights = from_official(official, "dit" if kind == "none" else "dtr")
    assert_same(weights, network.state_dict())
    config = official_config(official, "dit" if kind == "none" else "dtr", num_heads=4)
    assert config["routing"]["type"] == kind
    if kind == "none":
        folder = ["--out", f"{tmp_path}/b"]
        assert main(["convert", str(run), "--from", "run", "--to", "diffusers", *folder]) == 0
        assert load_diffusers(tmp_path / "b").config["sample_size"] == 8
