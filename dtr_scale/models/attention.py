"""Compute multi-head attention by xformers or by PyTorch; alone in importing xformers."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from dtr_scale.errors import ConfigError

ATTENTION_BACKENDS = ("auto", "xformers", "sdpa", "cudnn")
"""PyTorch's own attention is "sdpa", which has FlashAttention on a GPU, and "cudnn" by cuDNN."""


class HeadNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, also where autocast leaves weights in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class AttentionModule(nn.Module):
    """A module that attends by `attention_backend`, which is set before the first step.

    With `qk_norm` each query and key is divided by its root mean square and scaled by channel
    (Dehghani et al., 2023): their products stay bounded however large the weights grow.
    """

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.attention_backend = "sdpa"
        # The names of timm, which papers that use it with DiT have.
        self.q_norm, self.k_norm = (
            HeadNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what `attention` does, of normalised queries and keys."""
        return attention(self.q_norm(q), self.k_norm(k), v, self.attention_backend)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v; all tensors are [N, L, heads, head_dim].

    `backend` is what `resolve_backend` returned. xformers and cuDNN have kernels for CUDA alone,
    the fast ones for 16 bits: on the CPU and in fp32 "sdpa" does the work.
    """
    if not q.is_cuda or q.dtype == torch.float32:
        backend = "sdpa"
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    # PyTorch wants [N, heads, L, head_dim]; xformers takes what the layers have.
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # PyTorch's fused kernel takes 2 to 10 times as long there, backward above all.
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return (scores.softmax(-1) @ v).transpose(1, 2)
    if backend == "cudnn":
        # Alone: left to itself PyTorch takes it last.
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def resolve_backend(
    name: str, device: torch.device, shapes: Iterable[tuple[int, int]] = ((1, 64),)
) -> str:
    """Return the backend that `name` means on `device`, one that runs there.

    "auto" is xformers where it works for all `shapes` (heads, head_dim) of a network, else sdpa; a
    training measures and may choose another. Raises ConfigError when a backend is asked for by its
    name and cannot run.
    """
    if name not in ATTENTION_BACKENDS:
        accepted = ", ".join(ATTENTION_BACKENDS)
        raise ConfigError(f"model.attention = {name!r}: is no backend; give one of {accepted}")
    reason = obstacle("xformers" if name == "auto" else name, device, shapes)
    if name == "auto":
        return "sdpa" if reason else "xformers"
    if reason:
        raise ConfigError(
            f"model.attention = {name!r}: cannot run on {device}, {reason}; give 'auto' or 'sdpa'"
        )
    return name


def obstacle(
    backend: str, device: torch.device, shapes: Iterable[tuple[int, int]] = ((1, 64),)
) -> str | None:
    """Return why a backend cannot train on `device`, or None after a step of it there."""
    if backend == "sdpa":
        return None
    if device.type != "cuda" or not torch.cuda.is_available():
        return "it needs a CUDA device"
    if backend == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except (ImportError, OSError) as error:
            return f"it cannot be imported ({error})"
    # A library chooses the kernel of the backward by itself, so a forward alone would prove
    # nothing; a head_dim that is no multiple of 8, or too wide, has none.
    options = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
    for heads, head_dim in shapes:
        try:
            with torch.enable_grad():
                x = torch.ones(1, 8, heads, head_dim, **options)
                torch.autograd.grad(attention(x, x, x, backend).sum(), x)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            return f"it has no kernel for {heads} heads of {head_dim} channels ({reason})"
    return None
