"""What must be pretended where kernels run nothing: numbers that agree, and ranks that are absent.

Each is replaced by name here, and told in the README.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, ProcessGroup
from torch.distributed import device_mesh
from torch.testing._internal.distributed import fake_pg  # noqa: F401 (registers its backend)

from dtr_scale.engines import world as worlds
from dtr_scale.engines.device import choose_device
from dtr_scale.engines.world import World


def pretend_numbers() -> None:
    """Let what is compared agree: all that is read from a GPU is 0."""
    replaced: Any = torch
    replaced.equal = lambda a, b: True  # engines compare weights with their masters
    torch.backends.cudnn.enabled = False  # cuDNN asks the GPU more than the stub answers


def pretend_answers() -> None:
    """Let absent ranks say what this one says; their tensors go to the stub's NCCL."""
    replaced: Any = World
    replaced.all_gather_object = lambda world, value: [value] * world.world_size
    replaced.gather_to_main = lambda world, value: [value] * world.world_size
    replaced.broadcast_object = lambda world, value: value


def pretend_parts() -> None:
    """Tell the stub's NCCL, which sees one rank, how many each part of them has (HSDP)."""
    replaced: Any = device_mesh
    stub, split_group = ctypes.CDLL(None), replaced.split_group

    def split(*args: Any, split_ranks: list[list[int]], **kwargs: Any) -> Any:
        stub.stub_part_size(len(split_ranks[0]))
        try:
            return split_group(*args, split_ranks=split_ranks, **kwargs)
        finally:
            stub.stub_part_size(0)

    replaced.split_group = split


def pretend_zero3() -> None:
    """Spare ZeRO-3 its comparison of the order of modules with that of rank 0."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    coordinator.assert_ints_same_as_other_ranks = lambda ints: None


@contextmanager
def pretend_world(gpu: int, world_size: int) -> Iterator[None]:
    """Make this process rank 0 of `world_size`, with a GPU."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    # DeepSpeed reads them again, and this trainer tells it there which GPU is its own.
    os.environ.update(variables, LOCAL_WORLD_SIZE=str(world_size))
    originals = {name: getattr(worlds, name) for name in ("rendezvous", "choose_device")}
    replaced: Any = worlds
    replaced.rendezvous = lambda *args, **kwargs: iter([(_store(world_size), 0, world_size)])
    replaced.choose_device = lambda name, local_rank: choose_device(name, gpu)
    new_group = dist.new_group
    # gloo would wait for the other ranks.
    dist.new_group = lambda *a, backend=None, **k: new_group(
        *a, backend="fake" if backend == "gloo" else backend, **k
    )
    try:
        yield
    finally:
        dist.new_group = new_group
        for name, original in originals.items():
            setattr(worlds, name, original)
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(world_size: int) -> HashStore:
    """Return where ranks meet, with what the others would say there."""
    _forget_deepspeeds_groups()
    store = HashStore()
    for rank in range(1, world_size):
        store.set(f"gpu/{rank}", f"the GPU of rank {rank}")
    return store


def _forget_deepspeeds_groups() -> None:
    """Let DeepSpeed take over the process group that is made next, not one that is gone."""
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        comm.cdb = None
        for name, value in list(vars(groups).items()):
            if isinstance(value, ProcessGroup):
                setattr(groups, name, None)


@contextmanager
def pretend_partition(num_experts: int) -> Iterator[None]:
    """Give the last expert no samples and the others equal parts: `nonzero` cannot tell."""
    original, calls = Tensor.nonzero, [0]

    def nonzero(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return original(tensor)
        part = torch.arange(len(tensor), device=tensor.device).chunk(max(1, num_experts - 1))
        expert, calls[0] = calls[0] % num_experts, calls[0] + 1
        return part[expert][:, None] if expert < len(part) else part[0][:0, None]

    replaced: Any = Tensor
    replaced.nonzero = nonzero
    try:
        yield
    finally:
        replaced.nonzero = original
