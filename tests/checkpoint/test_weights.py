"""Read weights from files of others, without trusting their pickles."""

import argparse
import os
import pickle
import runpy
import sys
import types
import typing
from collections import defaultdict

import pytest
import torch
from safetensors.torch import save_file

from dtr_scale.checkpoint.weights import read_pickle, read_weights
from dtr_scale.errors import CheckpointError
from tests.support.weights import AVERAGED, WEIGHTS, assert_same, checkpoint


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
@pytest.mark.parametrize("function", ["os.system", "eval", "exec", "runpy.run_path"])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, saved, container, function):
    marker, script = tmp_path / "executed", tmp_path / "script.py"
    script.write_text(f"open({str(marker)!r}, 'w')")
    hostile = {
        "os.system": Hostile(os.system, f"touch {marker}"),
        "eval": Hostile(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Hostile(exec, f"open({str(marker)!r}, 'w')"),
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


def test_an_attribute_that_a_file_names_is_left_inert(saved):
    """So do enums of Python 3.11.0 to 3.11.3."""
    stage = Hostile(getattr, argparse.Namespace(a=1), "a")
    path = saved(checkpoint(args=argparse.Namespace(stage=stage), stage=stage))
    assert_same(read_weights(path), AVERAGED)
    assert not isinstance(read_pickle(path)["stage"], int)


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
