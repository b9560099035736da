"""Choose how matrix products and convolutions round, and compute so for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from dtr_scale.errors import ConfigError
from dtr_scale.models.denoiser import Denoiser


def resolve_precision(name: str, device: torch.device) -> str:
    """Return "bf16", "tf32" or "fp32": what `evaluation.precision` means on a device.

    "auto" is bf16 on a GPU and fp32 on a CPU. Raises ConfigError for TF32 on a CPU.
    """
    if name == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"evaluation.precision = 'tf32' needs a GPU, this is a {device.type}; give auto, bf16 "
            "or fp32"
        )
    return name


def cast(network: Denoiser, precision: str) -> Denoiser:
    """Return a network whose weights are in the precision that it is to compute in, in place."""
    # Cast once, not by autocast at every forward. Timesteps stay fp32 up to their sinusoids.
    return network.to(torch.bfloat16) if precision == "bf16" else network


@contextlib.contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Compute fp32 products as "tf32", or else exactly as fp32, whatever the process has allowed.

    Autocast is off: it would round them to 16 bits.
    """
    of_torch: Any = torch.backends  # whose types know not all of these
    on_gpu = (of_torch.cuda.matmul, of_torch.cudnn.conv)
    # On a CPU "high" and "medium" may mean bf16.
    backends = (*on_gpu, of_torch.mkldnn.matmul, of_torch.mkldnn.conv)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32" if precision == "tf32" and backend in on_gpu else "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute on one thread of a CPU: how work is cut over threads moves the last digits."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
