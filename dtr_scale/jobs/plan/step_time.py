"""Put a training step together: micro-steps, exchanges that are not hidden, the update."""

from dataclasses import dataclass, field

from dtr_scale.jobs.plan.cluster import Cluster, Exchange, exchanges
from dtr_scale.jobs.plan.layout import Layout
from dtr_scale.jobs.plan.memory import Sizes
from dtr_scale.jobs.plan.roofline import Seconds

_ADAM_BYTES = 28
"""Of an element: gradient, master and moments are read, all but the gradient written, in fp32."""
_EMA_BYTES, _CAST_BYTES = 12, 6
_FUSED_EMA_BYTES, _FUSED_CAST_BYTES = 8, 2
"""Of `flat`, whose update makes averages and casts of what it has just computed."""
_DEEPSPEED_COPIES = 24
"""Of an element: DeepSpeed's ways into and out of its buckets at stages 1 and 2."""


@dataclass(frozen=True)
class StepTime:
    """The seconds of one step of every rank."""

    forward: float
    backward: float
    exposed: float
    """Exchanges that nothing is computed beside."""
    update: float
    vae: float = 0.0
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.exposed + self.update + self.vae

    @property
    def exchanged_bytes(self) -> float:
        return sum(each.num_bytes for each in self.exchanges)

    @property
    def exchange_seconds(self) -> float:
        return sum(each.seconds for each in self.exchanges)


def step_time(
    layout: Layout,
    sizes: Sizes,
    cluster: Cluster,
    micro_step: tuple[Seconds, Seconds],
    *,
    factor: float = 1.0,
    vae: float = 0.0,
) -> StepTime:
    """Return the time of a step; what is computed takes `factor` times what the roofline says."""
    forward, backward = (factor * part.total * layout.grad_accum_steps for part in micro_step)
    found = exchanges(layout, sizes.parameters, sizes.trained, cluster)
    return StepTime(
        forward=forward,
        backward=backward,
        exposed=_exposed(found, forward, backward, layout, sizes),
        update=factor * _update(layout, sizes, cluster),
        vae=vae,
        exchanges=found,
    )


def _exposed(
    found: list[Exchange], forward: float, backward: float, layout: Layout, sizes: Sizes
) -> float:
    # Where gradients are exchanged once, the last micro-step's backward alone is beside it.
    window = {"forward": forward, "backward": backward, None: 0.0}
    if layout.name in ("zero-1", "flat", "fsdp2", "ddp"):
        window["backward"] = backward / layout.grad_accum_steps
    # The first part of a forward and the last of a backward have nothing beside them.
    alone = min(1.0, layout.blocks_at_once * sizes.largest_block / sizes.parameters)
    exposed = 0.0
    for beside in window:
        seconds = sum(each.seconds for each in found if each.beside == beside)
        exposed += max(seconds - window[beside], alone * seconds if beside else seconds)
    return exposed


def _update(layout: Layout, sizes: Sizes, cluster: Cluster) -> float:
    whole = layout.name in ("single", "ddp", "zero-0")
    share = 1 if whole else layout.shard
    ema, cast = _EMA_BYTES, _CAST_BYTES
    if layout.is_flat:
        ema, cast = _FUSED_EMA_BYTES, _FUSED_CAST_BYTES
    moved = (sizes.trained * _ADAM_BYTES + sizes.parameters * sizes.averages * ema) / share
    if layout.computes_in == "bf16":
        moved += sizes.parameters * cast / share
    if layout.name in ("zero-1", "zero-2"):
        moved += sizes.trained * _DEEPSPEED_COPIES
    return moved / cluster.gpu.bandwidth
