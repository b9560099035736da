"""List known GPUs: memory and speed by their data sheets, and the share that kernels reach."""

import difflib
import re
from dataclasses import dataclass

import torch

from dtr_scale.errors import ConfigError

GB, TERA = 1e9, 1e12

# A large square product against the data sheet: about 798 of 989 TFLOP/s on an H100 and 790 on an
# H200. Not known here of the others, for which 0.85 (A100) and 0.8 are assumed.
_LARGE_PRODUCT = {"a100": 0.85}
_LARGE_PRODUCT_ELSEWHERE = 0.8
PRODUCT_EFFICIENCY = 0.79
"""Of a large product's speed, what a DiT's products reach: 50 to 84% by their shapes."""
BANDWIDTH_EFFICIENCY = 0.8
"""Of the data sheet's bandwidth, what element-wise kernels reach; copies reach 0.85 to 0.9."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Speeds are dense, with fp32 sums."""

    name: str
    title: str
    """As its driver names it, in part."""
    memory_gb: float
    """What CUDA reports as total, in 1e9 bytes."""
    bf16_tflops: float
    tf32_tflops: float
    bandwidth_gb: float
    """Of its memory, a second."""
    attention_tflops: float
    """FlashAttention 2, forward and backward, at 256 tokens and heads of 64 in bf16."""
    link_gb: float
    """NCCL's bus bandwidth between the GPUs of a node, a second."""
    network_gbps: float
    """Between nodes: all adapters of a node of 8, as the usual machine has them."""

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * GB

    @property
    def bandwidth(self) -> float:
        """Bytes a second that element-wise kernels reach."""
        return BANDWIDTH_EFFICIENCY * self.bandwidth_gb * GB

    def product_flops(self, precision: str) -> float:
        """FLOP/s of the network's matrix products in "bf16" (and by autocast) or "fp32"."""
        nominal = self.tf32_tflops if precision == "fp32" else self.bf16_tflops
        share = _LARGE_PRODUCT.get(self.name.partition("-")[0], _LARGE_PRODUCT_ELSEWHERE)
        return PRODUCT_EFFICIENCY * share * nominal * TERA

    def attention_flops(self, precision: str) -> float:
        """FLOP/s of the fused attention; in fp32 it is half as fast, as all products are."""
        return self.attention_tflops * TERA / (2 if precision == "fp32" else 1)


# Data sheets: NVIDIA's of A100, H100, H200, DGX B200, L40S and A10, and the whitepaper of Ada for
# the RTX 4090. Bus bandwidth: NCCL's all_reduce_perf as it is usually told of such machines, 235
# (A100) and 400 (H100) GB/s over NVLink; what goes over PCIe is assumed. Networks: 8 adapters of
# 200 Gbit/s (DGX A100) or 400 Gbit/s (DGX H100, B200); assumed for the others.
_KNOWN = (
    Gpu("a100-40gb", "A100-SXM4-40GB", 42.3, 312, 156, 1555, 125, 235, 1600),
    Gpu("a100-80gb", "A100-SXM4-80GB", 85.0, 312, 156, 2039, 125, 235, 1600),
    Gpu("a100-80gb-pcie", "A100 80GB PCIe", 85.0, 312, 156, 1935, 125, 20, 200),
    Gpu("h100-80gb", "H100 80GB HBM3", 85.0, 989, 495, 3350, 167, 400, 3200),
    Gpu("h100-80gb-pcie", "H100 PCIe", 85.0, 756, 378, 2000, 130, 40, 400),
    Gpu("h200-141gb", "H200", 150.1, 989, 495, 4800, 167, 400, 3200),
    Gpu("b200-180gb", "B200", 191.0, 2250, 1125, 8000, 300, 700, 3200),
    Gpu("l40s-48gb", "L40S", 47.7, 362, 183, 864, 110, 20, 200),
    Gpu("a10-24gb", "A10", 23.7, 125, 62, 600, 45, 12, 50),
    Gpu("rtx4090-24gb", "RTX 4090", 25.4, 165, 83, 1008, 80, 12, 25),
)
GPUS = {gpu.name: gpu for gpu in _KNOWN}


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name here; ConfigError lists those that are known."""
    if name in GPUS:
        return GPUS[name]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.3)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--gpu={name} is not known{meant}; accepted are {', '.join(GPUS)}")


def named(gpu: Gpu, device: str) -> bool:
    """Tell whether a driver's name of a device, such as "NVIDIA H200", is this kind's."""
    return bool(re.search(rf"\b{re.escape(gpu.title)}\b", device))


def nominal_flops(device: torch.device, precision: str) -> float | None:
    """Return what the data sheet of a GPU promises for bf16; None where it is not known here."""
    if device.type != "cuda" or precision != "bf16":
        return None
    driver = torch.cuda.get_device_name(device)
    return next((gpu.bf16_tflops * TERA for gpu in _KNOWN if named(gpu, driver)), None)
