"""A DTR-DiT in bf16 on a GPU, through each way to compute its blocks, against fp32 on the CPU."""

from collections import Counter
from typing import Any

import pytest
import torch

from dtr_scale.engines.wrap import checkpoint_activations, compile_blocks
from dtr_scale.jobs.attention import CANDIDATES
from dtr_scale.models.attention import resolve_backend
from dtr_scale.models.attention_timing import AttentionShape, time_attention
from dtr_scale.models.dit import DiT
from dtr_scale.models.routing import RoutingSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # torch.compile raises deprecations of its own
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and -m gpu"),
]

SIZES: Any = {"hidden_size": 128, "depth": 3, "num_heads": 2, "patch_size": 2, "input_size": 16}


def network():
    torch.manual_seed(0)
    model = DiT(**SIZES, num_classes=10, routing=RoutingSpec("dtr"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def forward_backward(model, device):
    """Return both outputs, and the gradients of input and weights, fp32 on the CPU."""
    torch.manual_seed(1)
    x = torch.randn(4, 4, 16, 16).to(device).requires_grad_()
    t = torch.tensor([0, 400, 900, 999]).to(device)
    y = torch.tensor([0, 3, 9, 10]).to(device)
    out = model(x, t, y)
    out.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        drawn = model(x, t, y)
    tensors = {"out": out, "drawn": drawn, "x": x.grad, **gradients}
    return {name: value.detach().float().cpu() for name, value in tensors.items()}


@pytest.fixture(scope="module")
def expected():
    return forward_backward(network(), "cpu")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["sdpa", "xformers", "cudnn"])
def test_bf16_agrees_with_fp32(backend, compiled, expected):
    model = network().cuda().bfloat16()
    model.use_attention(resolve_backend(backend, torch.device("cuda")))
    if compiled:
        compile_blocks(model.routed_blocks())
    actual = forward_backward(model, "cuda")
    for name, value in expected.items():
        # Of the whole tensor: single gradients that cancel have no digits left in bf16.
        error = (actual[name] - value).norm() / value.norm()
        assert error < 0.03, f"{name}: {error:.3f}"


def test_auto_prefers_xformers():
    assert resolve_backend("auto", torch.device("cuda")) == "xformers"


def test_backends_agree_under_activation_checkpointing():
    outputs = []
    for backend in ("sdpa", "xformers", "cudnn"):
        model = network().cuda().bfloat16()
        model.use_attention(backend)
        checkpoint_activations(model.routed_blocks())
        outputs.append(forward_backward(model, "cuda"))
    for name, value in outputs[0].items():
        for output in outputs[1:]:
            assert (output[name] - value).norm() < 0.03 * value.norm(), name


def test_all_ways_are_timed_at_the_shapes_of_a_large_network(capsys):
    """Those of DiT-L/2 at a micro-batch of 32."""
    shapes = Counter({AttentionShape(heads=16, head_dim=64, queries=256, keys=256): 24})
    timings = time_attention(
        CANDIDATES, shapes, num_samples=32, dtype=torch.bfloat16, device=torch.device("cuda")
    )
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}: {timings}")
    assert set(timings.milliseconds) >= {"sdpa", "xformers"}
    # On an A100 the matrix products alone take 3 ms.
    assert all(0.1 < figure < 100 for figure in timings.milliseconds.values())
