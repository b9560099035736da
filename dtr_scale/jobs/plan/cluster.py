"""Say on what a training runs, and how fast its ranks exchange."""

from dataclasses import dataclass

from dtr_scale.checkpoint.layout import ITEM_BYTES
from dtr_scale.jobs.plan.gpus import GB, Gpu
from dtr_scale.jobs.plan.layout import Layout

_NETWORK_EFFICIENCY = 0.85
"""Assumed: what NCCL reaches of the adapters' line rate."""
_BITS = 8


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    gpu: Gpu
    gpus: int
    """Of a node."""
    nodes: int = 1
    network_gbps: float | None = None
    """Between nodes, of all a node's adapters; None: what is usual for the GPU."""

    @property
    def world_size(self) -> int:
        return self.gpus * self.nodes

    @property
    def node_bandwidth(self) -> float:
        """Bytes a second that a node exchanges with others."""
        gbps = self.network_gbps or self.gpu.network_gbps
        return _NETWORK_EFFICIENCY * gbps / _BITS * GB

    @property
    def bus_bandwidth(self) -> float:
        """NCCL's bus bandwidth over all ranks: each ring passes every node's adapters once."""
        link = self.gpu.link_gb * GB
        return link if self.nodes == 1 else min(link, self.node_bandwidth)

    @property
    def title(self) -> str:
        gpus = f"{self.gpus} {self.gpu.name}" if self.gpus > 1 else self.gpu.name
        return gpus if self.nodes == 1 else f"{self.nodes} nodes of {gpus}"


@dataclass(frozen=True)
class Exchange:
    """What each rank sends and receives in a step for one purpose."""

    name: str
    num_bytes: float
    seconds: float
    beside: str | None
    """The part of the step that it runs beside: forward, backward, or None: it is waited for."""


def exchanges(
    layout: Layout, num_parameters: int, num_trained: int, cluster: Cluster
) -> list[Exchange]:
    """Return the collectives of a step, as each engine makes them.

    A ring's all-gather or reduce-scatter of S bytes moves (W - 1) / W x S through every rank, an
    all-reduce twice that.
    """
    ranks, micro_steps = layout.world_size, layout.grad_accum_steps
    if ranks == 1:
        return []
    ring = (ranks - 1) / ranks
    gradient = (2 if layout.exchange == "bf16" else ITEM_BYTES) * num_trained
    weight = layout.weight_bytes * num_parameters

    def over_all(name: str, num_bytes: float, beside: str | None) -> Exchange:
        return Exchange(name, num_bytes, num_bytes / cluster.bus_bandwidth, beside)

    match layout.name:
        case "ddp":
            return [over_all("all-reduce gradients", 2 * ring * gradient, "backward")]
        case "zero-0":
            return [over_all("all-reduce gradients", 2 * ring * gradient, None)]
        case "zero-1" | "zero-2":
            # Stage 2 keeps its part alone, and so exchanges after every micro-step.
            times = micro_steps if layout.name == "zero-2" else 1
            return [
                over_all("all-reduce gradients", times * 2 * ring * gradient, "backward"),
                over_all("all-gather weights", ring * weight, None),
            ]
        case "zero-3":
            return [
                over_all("reduce-scatter gradients", micro_steps * ring * gradient, "backward"),
                over_all("all-gather weights", micro_steps * ring * weight, "forward"),
                over_all("all-gather again", micro_steps * ring * weight, "backward"),
            ]
        case "fsdp2":
            return _fsdp2(layout, gradient, weight, cluster)
        case "flat":
            return [
                over_all("reduce-scatter gradients", ring * gradient, "backward"),
                over_all("all-gather weights", ring * weight, "forward"),
            ]
        case _:
            return []


def _fsdp2(layout: Layout, gradient: float, weight: float, cluster: Cluster) -> list[Exchange]:
    shards, replicas = layout.shard, layout.world_size // layout.shard
    ring = (shards - 1) / shards
    # Neighbours share weights; within a node where they are no more than it has.
    bandwidth = cluster.bus_bandwidth
    if shards <= cluster.gpus:
        bandwidth = cluster.gpu.link_gb * GB
    # What stays gathered does so over all micro-steps.
    times = layout.grad_accum_steps if layout.gathers_twice else 1
    found = [
        ("reduce-scatter gradients", ring * gradient, bandwidth, "backward"),
        ("all-gather weights", times * ring * weight, bandwidth, "forward"),
    ]
    if layout.gathers_twice:
        found.append(("all-gather again", times * ring * weight, bandwidth, "backward"))
    if replicas > 1:
        share = 2 * (replicas - 1) / replicas * gradient / shards
        between = cluster.node_bandwidth / cluster.gpus
        found.append(("all-reduce shards", share, between, "backward"))
    return [
        Exchange(name, num_bytes, num_bytes / speed, beside)
        for name, num_bytes, speed, beside in found
    ]
