"""Compute multi-head attention by xformers or by PyTorch; alone in importing xformers."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dtr_scale.errors import ConfigError

ATTENTION_BACKENDS = ("auto", "xformers", "sdpa")


class AttentionModule(nn.Module):
    """A module that attends by `attention_backend`, which may be set before the first step."""

    def __init__(self, attention_backend: str) -> None:
        super().__init__()
        self.attention_backend = attention_backend


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v; all tensors are [N, L, heads, head_dim].

    `backend` is what `resolve_backend` returned. xformers has kernels for CUDA alone, its fast ones
    for 16 bits: on the CPU and in fp32 PyTorch's attention does the work.
    """
    if backend == "xformers" and q.is_cuda and q.dtype != torch.float32:
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    # PyTorch wants [N, heads, L, head_dim]; xformers takes what the layers have.
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # PyTorch's fused kernel takes 2 to 10 times as long there, backward above all.
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return (scores.softmax(-1) @ v).transpose(1, 2)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def resolve_backend(name: str, device: torch.device) -> str:
    """Return "xformers" or "sdpa": the backend that `name` means on `device`.

    "auto" is xformers where it works, else sdpa. Raises ConfigError when "xformers" is asked for
    and cannot run.
    """
    if name not in ATTENTION_BACKENDS:
        accepted = ", ".join(ATTENTION_BACKENDS)
        raise ConfigError(f"model.attention = {name!r}: is no backend; give one of {accepted}")
    if name == "sdpa":
        return "sdpa"
    obstacle = _xformers_obstacle(device)
    if obstacle is None:
        return "xformers"
    if name == "xformers":
        raise ConfigError(
            f"model.attention = 'xformers': cannot run on {device}, {obstacle}; "
            "give 'auto' or 'sdpa'"
        )
    return "sdpa"


def _xformers_obstacle(device: torch.device) -> str | None:
    """Return why xformers cannot train on `device`, or None after a step of it there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "it needs a CUDA device"
    try:
        from xformers.ops import memory_efficient_attention
    except (ImportError, OSError) as error:
        return f"it cannot be imported ({error})"
    # xformers chooses the kernel of the backward by itself, so a forward alone would prove
    # nothing. 64 is the head_dim of DiT-S, B and L; others are not tried.
    with torch.enable_grad():
        x = torch.ones(1, 8, 1, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        try:
            torch.autograd.grad(memory_efficient_attention(x, x, x).sum(), x)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            return f"it has no kernel there ({str(error).splitlines()[0]})"
    return None
