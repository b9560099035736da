"""Sums of bias gradients: by sample in the graph that is compiled, and the same numbers."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear, scaled_dot_product_attention

from dtr_scale.engines.bias_gradients import SUM_BY_SAMPLE

N, L, D = 3, 5, 12
SUM = torch.ops.aten.sum.dim_IntList


def gated(x, weight, bias):
    return torch.linspace(-1, 1, N * D).view(N, 1, D).to(x.dtype) * linear(x, weight, bias)


def gated_from_the_right(x, weight, bias):
    return linear(x, weight, bias) * torch.linspace(-1, 1, N * D).view(N, 1, D).to(x.dtype)


def squared(x, weight, bias):
    return linear(x, weight, bias).square()


def attention(x, weight, bias):
    qkv = linear(x, weight, bias).view(N, L, 3, 2, D // 6)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return scaled_dot_product_attention(q, k, v)


def by_condition(x, weight, bias):
    # Of rows that are samples, as adaLN's: nothing to sum over first.
    return linear(x[:, 0], weight, bias)


def gradients_of(layer, dtype=torch.float32):
    """Return a function that computes the layer's gradients, and what to call it with."""
    torch.manual_seed(0)
    shapes = (N, L, D), (D, D), (D,)
    inputs = [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]

    def gradients(x, weight, bias):
        # One that differs by token, and is no view.
        out = layer(x, weight, bias)
        return torch.autograd.grad((out * torch.sin(out)).sum(), (x, weight, bias))

    return gradients, inputs


def sums_over_rows(graph):
    sums = graph.find_nodes(op="call_function", target=SUM)
    return [node for node in sums if node.args[1] == [0] and node.args[0].meta["val"].ndim == 2]


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("layer", [gated, gated_from_the_right, squared, attention])
def test_a_bias_gradient_is_summed_by_sample_first(layer, mode):
    gradients, inputs = gradients_of(layer)
    traced = make_fx(gradients, tracing_mode=mode)(*inputs)
    assert sums_over_rows(traced.graph)
    SUM_BY_SAMPLE(traced.graph)
    traced.recompile()
    assert not sums_over_rows(traced.graph)
    for expected, actual in zip(gradients(*inputs), traced(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_in_bf16_samples_are_summed_in_fp32():
    gradients, inputs = gradients_of(squared, torch.bfloat16)
    traced = make_fx(gradients, tracing_mode="fake")(*inputs)
    SUM_BY_SAMPLE(traced.graph)
    traced.recompile()
    for expected, actual in zip(gradients(*inputs), traced(*inputs), strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected)
    by_sample = [n for n in traced.graph.find_nodes(op="call_function", target=SUM) if n.kwargs]
    assert [node.meta["val"].dtype for node in by_sample] == [torch.float32]


def test_a_sum_over_samples_stays_as_it_is():
    gradients, inputs = gradients_of(by_condition)
    traced = make_fx(gradients, tracing_mode="fake")(*inputs)
    before = str(traced.graph)
    SUM_BY_SAMPLE(traced.graph)
    assert str(traced.graph) == before
    assert sums_over_rows(traced.graph)
