"""Products of a compiled block on a CPU: in the order that is read, and the same numbers."""

import pytest
import torch
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from dtr_scale.engines.cpu_products import TRANSPOSE_BEFORE
from dtr_scale.engines.wrap import compile_blocks
from dtr_scale.models.attention import attention

aten = torch.ops.aten
N, L, HEADS, D = 2, 8, 3, 4


def attention_gradients(q, k, v):
    out = attention(q, k, v, "sdpa")
    return torch.autograd.grad((out * torch.sin(out)).sum(), (q, k, v))


def bf16(*shapes):
    torch.manual_seed(0)
    return [torch.randn(*shape).bfloat16().requires_grad_() for shape in shapes]


def products(traced):
    nodes = traced.graph.find_nodes(op="call_function", target=aten.bmm.default)
    return [tuple(node.meta["val"].shape) for node in nodes]


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_the_gradient_of_keys_is_made_as_it_is_read(mode):
    inputs = bf16(*[(N, L, HEADS, D)] * 3)
    # As the compiler has it, which makes a transpose a permutation.
    traced = make_fx(attention_gradients, select_decomp_table(), mode)(*inputs)
    expected = traced(*inputs)
    assert (N * HEADS, D, L) in products(traced)  # k^T's
    TRANSPOSE_BEFORE(traced.graph)
    traced.recompile()
    assert all(shape[1] == L for shape in products(traced))
    for actual, wanted in zip(traced(*inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


class Scores(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.transpose(-1, -2)


def gradient_of_keys(q, k):
    return torch.autograd.grad(Scores()(q, k).sin().sum(), k)


@pytest.mark.parametrize(("dtype", "changes"), [(torch.bfloat16, True), (torch.float32, False)])
def test_fp32_stays_as_it_is(dtype, changes):
    inputs = [x.detach().to(dtype).requires_grad_() for x in bf16(*[(N, L, D)] * 2)]
    traced = make_fx(gradient_of_keys, select_decomp_table(), "fake")(*inputs)
    before = str(traced.graph)
    TRANSPOSE_BEFORE(traced.graph)
    assert (str(traced.graph) != before) == changes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_block_makes_it_so():
    plain, compiled = Scores(), Scores()
    compile_blocks([compiled])
    q, k, gradient = bf16((N, L, D), (N, L, D), (N, L, L))

    def trained(scores: torch.nn.Module) -> list[torch.Tensor]:
        out = scores(q, k)
        return [out, *torch.autograd.grad(out, (q, k), gradient.detach())]

    with inductor.patch({"fx_graph_cache": False}), functorch.patch(enable_autograd_cache=False):
        actual, code = run_and_get_code(trained, compiled)
    torch.testing.assert_close(actual, trained(plain))
    assert "extern_kernels.bmm" in "".join(code)
    assert f"empty_strided_cpu(({N}, {D}, {L})" not in "".join(code)  # the gradient of k^T
