import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

from dtr_scale.engines.wrap import checkpoint_activations, compile_blocks, is_compiled
from dtr_scale.errors import EngineError
from dtr_scale.models.dit import DiT
from dtr_scale.models.routing import RoutingSpec
from dtr_scale.models.unet import ADM

DIT: Any = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "input_size": 8}
IMAGE: Any = {
    "image_size": 8, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [2],
    "channel_mult": [1, 2], "num_heads": 2, "in_channels": 4,
}  # fmt: skip
NETWORKS = [
    pytest.param(lambda: DiT(**DIT, num_classes=5, routing=RoutingSpec("dtr")), id="dit"),
    pytest.param(lambda: ADM(**IMAGE, num_classes=5, routing=RoutingSpec("dtr")), id="adm"),
]


def network(build) -> Any:
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def trained(model):
    """Return the output and every gradient of one backward."""
    torch.manual_seed(1)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 2])
    out = model(x, t, y)
    out.square().mean().backward()
    return [out, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("build", NETWORKS)
def test_recomputing_blocks_changes_no_number_and_no_name(build):
    plain, wrapped = network(build), network(build)
    checkpoint_activations(wrapped.routed_blocks())
    for expected, actual in zip(trained(plain), trained(wrapped), strict=True):
        assert torch.equal(expected, actual)
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in wrapped.named_modules()] == [n for n, _ in plain.named_modules()]


@pytest.mark.parametrize("build", NETWORKS)
def test_a_block_is_computed_again_in_the_backward(build):
    model, calls = network(build), []
    checkpoint_activations(model.routed_blocks())
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, inputs: calls.append(block))
    trained(model)
    assert calls[: len(model.blocks)] == list(model.blocks)
    assert calls[len(model.blocks) :] == list(model.blocks)[::-1]


# torch.compile looks at .grad of the tokens and hides its warning; as an error it cannot.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_blocks_are_compiled_and_recomputed_together():
    build, graphs = NETWORKS[0].values[0], []
    plain, wrapped = network(build), network(build)

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in wrapped.blocks:
        block.compile(backend=count, fullgraph=True)
    checkpoint_activations(wrapped.routed_blocks())
    for expected, actual in zip(trained(plain), trained(wrapped), strict=True):
        torch.testing.assert_close(actual, expected)
    assert graphs
    assert list(wrapped.state_dict()) == list(plain.state_dict())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_the_compiler_is_told_how_many_shapes_to_expect():
    model = network(NETWORKS[1].values[0])
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_blocks(model.routed_blocks())
        assert torch._dynamo.config.recompile_limit == 2 * len(model.blocks)
    assert all(block._compiled_call_impl for block in model.blocks)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_machine_without_a_compiler_is_told_what_to_install():
    model = network(NETWORKS[0].values[0])
    compile_blocks(model.routed_blocks())
    with (
        inductor.patch({"cpp.cxx": (None, "no-such-g++"), "fx_graph_cache": False}),
        pytest.raises(EngineError, match=r"engine\.compile = true: .*C\+\+ compiler.*python3-dev"),
    ):
        trained(model)


class Gelu(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x, approximate="tanh")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_gelu_is_as_exact_by_one_exponential():
    plain, compiled = Gelu(), Gelu()
    compile_blocks([compiled])
    x = torch.linspace(-40, 40, 4001).requires_grad_()

    def trained(gelu: torch.nn.Module) -> list[torch.Tensor]:
        out = gelu(x)
        return [out, *torch.autograd.grad(out.sum(), x)]

    with inductor.patch({"fx_graph_cache": False}), functorch.patch(enable_autograd_cache=False):
        actual, code = run_and_get_code(trained, compiled)
    torch.testing.assert_close(actual, trained(plain))
    assert ".exp()" in "".join(code)
    assert ".tanh()" not in "".join(code)


def test_auto_compiles_on_a_gpu_where_there_is_a_compiler(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [is_compiled(setting, cpu) for setting in (True, False, "auto")] == [True, False, False]
    monkeypatch.delenv("CC", raising=False)
    found = Path(sysconfig.get_path("include"), "Python.h").is_file() and shutil.which("gcc")
    assert is_compiled("auto", gpu) == bool(found)
    monkeypatch.setenv("PATH", "/nowhere")
    assert not is_compiled("auto", gpu)
    assert is_compiled(True, gpu)  # asked for: its failure is told at the first step
