"""Estimate what kernels take on a GPU: products by its arithmetic, all else by its memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from dtr_scale.jobs.plan.fusion import compiled_saved, fused_bytes
from dtr_scale.jobs.plan.gpus import Gpu
from dtr_scale.jobs.plan.trace import Operation, Trace

_SHORTEST_KERNEL = 3e-6
"""Seconds from a kernel's begin to the next one's, however little it does."""
_EAGER_LAUNCH = 6e-6
"""Seconds of a host's core for one operation of eager PyTorch; a fast core is assumed."""
_COMPILED_BLOCK = 4e-4
"""Seconds of a host's core for a compiled block, forward and backward."""


@dataclass(frozen=True)
class Seconds:
    """A part of the step by what the GPU does in it."""

    products: float = 0.0
    attention: float = 0.0
    pointwise: float = 0.0
    host: float = 0.0
    """What the GPU waits for, since it is faster than the host can tell it what to do."""

    @property
    def total(self) -> float:
        return self.products + self.attention + self.pointwise + self.host


def forward_and_backward(
    trace: Trace, gpu: Gpu, *, precision: str, compiled: bool
) -> tuple[Seconds, Seconds]:
    """Return the time of one micro-step's forward and backward, recomputation included."""
    kept = compiled_saved(trace) if compiled else set[int]()
    parts = []
    for operations in (trace.forward, trace.backward):
        on_gpu = _on_gpu(operations, gpu, precision, kept if compiled else None)
        launched = len(operations) * _EAGER_LAUNCH
        if compiled:
            share = len(operations) / (len(trace.forward) + len(trace.backward))
            launched = trace.num_blocks * _COMPILED_BLOCK * share
        waits = max(0.0, launched - on_gpu.total)
        parts.append(Seconds(on_gpu.products, on_gpu.attention, on_gpu.pointwise, waits))
    return parts[0], parts[1]


def _on_gpu(
    operations: Sequence[Operation], gpu: Gpu, precision: str, kept: set[int] | None
) -> Seconds:
    products = attention = 0.0
    for operation in operations:
        moved = operation.num_bytes / gpu.bandwidth
        if operation.kind == "product":
            products += max(operation.flops / gpu.product_flops(precision), moved, _SHORTEST_KERNEL)
        elif operation.kind == "attention":
            computed = operation.flops / gpu.attention_flops(precision)
            attention += max(computed, moved, _SHORTEST_KERNEL)
    if kept is None:
        traffic = [each.num_bytes for each in operations if each.kind == "pointwise"]
    else:
        traffic = list(fused_bytes(operations, kept))
    pointwise = sum(max(each / gpu.bandwidth, _SHORTEST_KERNEL) for each in traffic)
    return Seconds(products, attention, pointwise)


# The encoder of Stable Diffusion's autoencoder on one picture of 256x256: its products, and what
# its other kernels read and write in fp32, by this trainer's trace of diffusers' AutoencoderKL.
_VAE_FLOPS, _VAE_BYTES, _VAE_KERNELS = 2 * 135.8e9, 1.75e9, 105


def vae_seconds(gpu: Gpu, pictures: int, precision: str) -> float:
    """Return the time that the released loop encodes a micro-batch of 256x256 pictures in."""
    computed = pictures * _VAE_FLOPS / gpu.product_flops(precision)
    moved = pictures * _VAE_BYTES / gpu.bandwidth
    return computed + moved + _VAE_KERNELS * _SHORTEST_KERNEL
