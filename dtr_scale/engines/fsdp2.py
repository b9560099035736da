"""Train with PyTorch's FSDP2: fp32 shards of parameters, gathered for some blocks at a time.

The rows of a parameter are dealt out as `torch.chunk` cuts them, so a rank may hold fewer rows
than another, or none. With `replicate` above 1 (HSDP) that many groups of `shard` ranks hold the
same shards: neighbours in rank order, which launchers put on one node, exchange the weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dtr_scale.engines.base import (
    ADAM_MOMENTS,
    AdamSettings,
    Engine,
    Judge,
    Piece,
    adam_state,
    build_optimizer,
    pieces_of,
    undecayed,
)
from dtr_scale.engines.world import World

GROUP_SIZE = 4
"""Blocks whose weights are gathered and whose gradients are reduced as one, where weights stay
gathered: each exchange takes the host about a millisecond, as long as a GPU takes for a block."""


class Fsdp2Engine(Engine):
    """Sharded blocks behind the engine's surface; FSDP's averaging over ranks is turned off."""

    def __init__(
        self,
        network: nn.Module,
        *,
        blocks: Sequence[nn.Module],
        world: World,
        replicate: int,
        shard: int,
        grad_clip: float | None = None,
        precision: str = "bf16",
        exchange: str = "fp32",
        reshard_after_forward: bool = True,
        **adam: Unpack[AdamSettings],
    ) -> None:
        sizes = {"replicate": replicate, "shard": shard} if replicate > 1 else {"shard": shard}
        mesh = init_device_mesh(
            world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
        )
        self._reshards = reshard_after_forward
        self._num_shards, self._shard = shard, mesh.get_local_rank("shard")
        # For the gathered weights, and for the sum over ranks.
        policy = MixedPrecisionPolicy(
            torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.bfloat16 if exchange == "bf16" else torch.float32,
        )
        # One after the other, so that no more than a group of the whole is ever on the device.
        for group in group_blocks(network, blocks, 1 if reshard_after_forward else GROUP_SIZE):
            fully_shard(
                group, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
            )
        # The last layers are the first that a backward needs again.
        self._root = fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self.network = network
        for module in self._sharded_modules():
            # FSDP would divide by the number of ranks; losses are shares of a sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        # After sharding, which replaces every parameter by a DTensor: an optimizer made before
        # would go on updating the whole ones.
        self._parameters = list(network.parameters())
        exempt = undecayed(network, adam)
        self._adam = build_optimizer(network.named_parameters(), exempt, adam)
        self._grad_clip = grad_clip
        self._pieces = self._local_pieces()

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, step: int) -> Tensor:
        return self.network(x_t, t, y, step).float()

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        # Until the last one, each rank adds up whole gradients in fp32: memory against traffic.
        self._root.set_requires_gradient_sync(last)
        # What stays gathered does so until the weights change, after the last.
        self._root.set_reshard_after_backward(last or self._reshards)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def _update(self, judge: Judge | None) -> Tensor:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        assert isinstance(norm, DTensor)
        # Sums the shards' norms over all ranks. The result stays on the device.
        norm = norm.full_tensor()
        if self._grad_clip:  # without, every gradient would be multiplied by 1
            nn.utils.clip_grads_with_norm_(self._parameters, self._grad_clip, norm)
        self._heed(judge, norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def push_masters(self) -> None:
        """Drop gathered weights: after a forward without backward the root still holds its own."""
        for module in self._sharded_modules():
            module.reshard()

    def _sharded_modules(self) -> Iterator[FSDPModule]:
        return (module for module in self.network.modules() if isinstance(module, FSDPModule))

    def _local_pieces(self) -> dict[str, Piece]:
        pieces: dict[str, Piece] = {}
        for name, parameter in self.network.named_parameters():
            state = adam_state(self._adam, parameter)
            master = _local(parameter)
            if not master.numel():
                continue  # other ranks hold all of it
            # As torch.chunk cuts dim 0. Under HSDP all replicas report the same pieces, of which a
            # checkpoint stores one.
            rows = -(-parameter.shape[0] // self._num_shards)
            offset = self._shard * rows * (parameter.numel() // parameter.shape[0])
            moments = [_local(state[moment]) for moment in ADAM_MOMENTS]
            pieces |= pieces_of(name, parameter.shape, offset, master, moments)
        return pieces


def group_blocks(
    network: nn.Module, blocks: Sequence[nn.Module], size: int
) -> Iterator[list[nn.Module]]:
    """Yield `blocks` in groups of up to `size`: of neighbours in one list, as a DiT's are.

    FSDP2 wants all blocks of a group called in a forward, or none. An expert is called as a whole,
    so no group has blocks of two.
    """
    owners = {module: name.rpartition(".")[0] for name, module in network.named_modules()}
    for _, neighbours in groupby(blocks, key=owners.__getitem__):
        found = list(neighbours)
        yield from (found[start : start + size] for start in range(0, len(found), size))


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor as a flat view."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach().view(-1)
