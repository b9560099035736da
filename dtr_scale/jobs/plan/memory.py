"""Count the memory of each GPU by part, under each engine."""

from dataclasses import dataclass

from dtr_scale.checkpoint.layout import ITEM_BYTES
from dtr_scale.engines.deepspeed_config import REDUCE_BUCKET_SIZE
from dtr_scale.jobs.plan.fusion import compiled_saved
from dtr_scale.jobs.plan.layout import Layout
from dtr_scale.jobs.plan.trace import Trace

_MOMENTS = 2
_LIVE_PARAMETERS = 10**9
"""ZeRO-3 gathers no more at a time, and drops nothing below it (stage3_max_live_parameters)."""
CONTEXT_BYTES = 2e9
"""Assumed for CUDA's context, NCCL's buffers, workspaces of cuBLAS and loaded kernels."""
FRAGMENTATION = 1.05
"""Assumed: what PyTorch's allocator takes for what is asked of it."""


@dataclass(frozen=True)
class Sizes:
    """Elements of a network and how many averages are kept of it."""

    parameters: int
    trained: int
    """All but what is frozen, which has an average and moments, but no gradient."""
    largest_block: int
    outside_blocks: int
    averages: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the fullest moment of a step."""

    weights: float
    """As the network computes with them, what is gathered of them included."""
    gradients: float
    optimizer: float
    """fp32 masters, where they are not the weights themselves, and Adam's moments."""
    ema: float
    buffers: float
    """What exchanges pass through."""
    activations: float
    context: float
    late: float = 0.0
    """Of the gradients, those that are not there yet when activations take most."""

    @property
    def state(self) -> float:
        """What stays between steps, and does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.buffers

    @property
    def total(self) -> float:
        return self.allocated * (FRAGMENTATION if self.context else 1) + self.context

    @property
    def allocated(self) -> float:
        """What PyTorch hands out at the fullest moment, as `max_memory_allocated` tells."""
        return self.state + self.activations - self.late


def rank_memory(
    layout: Layout, sizes: Sizes, activations: float, trace: Trace | None = None
) -> Memory:
    """Return the memory of a rank that takes `activations` bytes for a micro-batch.

    `trace` tells how they go while gradients come; without it both are counted whole.
    """
    whole, part = sizes.parameters, sizes.parameters / layout.shard
    trained, trained_part = sizes.trained, sizes.trained / layout.shard
    low, item = layout.weight_bytes, ITEM_BYTES
    has_one_rank, accumulates = layout.world_size == 1, layout.grad_accum_steps > 1
    held = whole if layout.name in ("single", "ddp", "zero-0") else part
    masters = item * held
    buffers = 0.0
    match "flat" if layout.is_flat else layout.name:
        case "ddp":
            # Its buckets hold the gradients once more. AdamW that is not fused takes as much again
            # in pieces of which PyTorch's allocator makes no room for activations.
            weights, gradients, masters = item * whole, item * trained, 0.0
            buffers = item * 2 * trained
        case "single" | "zero-0":
            # By autocast and in fp32 the masters are the weights; autocast keeps a bf16 copy of
            # each weight until the backward.
            weights, gradients = float(low * whole), item * trained
            if layout.computes_in != "bf16":
                masters = 0.0
            if layout.computes_in == "autocast":
                buffers = 2 * whole
        case "zero-1":
            # All bf16 gradients until they are exchanged; an fp32 part of them for the update.
            weights, gradients = float(low * whole), low * trained + item * trained_part
            buffers = _buckets(layout, sizes)
        case "zero-2":
            weights, gradients = float(low * whole), item * trained_part + low * sizes.largest_block
            buffers = _buckets(layout, sizes)
        case "zero-3":
            weights = low * (part + min(whole, _LIVE_PARAMETERS))
            gradients = item * trained_part + low * sizes.largest_block
            buffers = _buckets(layout, sizes)
        case "fsdp2":
            # The shards of fp32 weights are the masters. A block is gathered while another is in
            # use; the parts outside of blocks stay gathered.
            gathered = sizes.outside_blocks + 2 * sizes.largest_block
            weights = low * (gathered if layout.gathers_twice else whole)
            gradients = item * (trained_part + (trained if accumulates else 0))
            # What a reduction reads, and a block's bf16 gradients; those of the other blocks of its
            # group are there when their activations are not.
            reduced = min(layout.blocks_at_once * sizes.largest_block, whole)
            buffers = item * reduced + low * sizes.largest_block
        case "flat":
            # Of several ranks, each has its part once more: cast, to be gathered from.
            weights = low * (whole + (0 if has_one_rank else trained_part))
            gradients = item * (trained + (0 if has_one_rank else trained_part))
            buffers = low * max(sizes.largest_block, sizes.outside_blocks)
            if layout.exchange == "bf16" and not has_one_rank:
                # Casts of all gradients until they are exchanged, and this rank's part of the sum.
                buffers += 2 * (trained + trained_part)
        case name:
            raise AssertionError(name)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=masters + _MOMENTS * item * held,
        ema=sizes.averages * item * held,
        buffers=buffers,
        activations=activations,
        context=CONTEXT_BYTES if layout.on_gpu else 0.0,
        late=0.0 if trace is None or accumulates else _late(layout, trace, activations, gradients),
    )


def _late(layout: Layout, trace: Trace, activations: float, gradients: float) -> float:
    """Return the bytes of gradients that come when activations are gone, in the one backward."""
    if layout.is_flat or layout.name == "zero-3":  # have room for all of them from the start
        return 0.0
    shrinks = activations / trace.peak_bytes
    grows = gradients / max(1, trace.curve[-1][1])
    fullest = max(shrinks * kept + grows * made for kept, made in trace.curve)
    return activations + gradients - max(fullest, gradients)


def _buckets(layout: Layout, sizes: Sizes) -> float:
    """Return what DeepSpeed sets aside for gradients on their way, however small the network is.

    Stages 1 and 2 have a bucket that is filled and one that is exchanged, in fp32; stage 3 has one.
    """
    if layout.name == "zero-3":
        return REDUCE_BUCKET_SIZE * layout.weight_bytes
    cast = ITEM_BYTES * min(REDUCE_BUCKET_SIZE, sizes.trained)
    return 2 * REDUCE_BUCKET_SIZE * layout.weight_bytes + (cast if layout.weight_bytes == 2 else 0)


def activation_bytes(trace: Trace, recomputed: Trace | None, *, compiled: bool) -> float:
    """Return the most that activations take in a step, with what backward computes of them.

    `recomputed` is the trace with activation checkpointing, where that is on. Compiled blocks keep
    what matrix products and normalisations have read or written. Linear in the micro-batch.
    """
    saving = 0
    if compiled:
        kept = compiled_saved(trace)
        saving = sum(size for key, size in trace.saved.items() if key not in kept)
    if recomputed is None:
        return trace.peak_bytes - saving
    # Of one block at a time.
    return recomputed.peak_bytes - saving / max(1, trace.num_blocks)


def snapshot_bytes(layout: Layout, sizes: Sizes, *, ranks: int) -> float:
    """Return the host memory that copies for checkpoints take on a node of so many ranks."""
    # Each piece is stored by one rank. Page-locked memory comes in powers of two.
    of_rank = checkpoint_bytes(sizes) / layout.world_size
    rounded = 1 << (int(of_rank) - 1).bit_length() if layout.on_gpu else of_rank
    return rounded * ranks


def checkpoint_bytes(sizes: Sizes) -> int:
    """Return the bytes of a checkpoint: masters, moments and averages in fp32."""
    return ITEM_BYTES * sizes.parameters * (1 + _MOMENTS + sizes.averages)
