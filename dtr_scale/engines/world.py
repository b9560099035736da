"""Join the processes of a run, and give each its rank, its device and its collectives."""

import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dtr_scale.engines.device import choose_device, gpu_name, refuse_shared_gpus
from dtr_scale.errors import DtrScaleError, EngineError
from dtr_scale.launchers import launched_rank, launched_world_size, local_world_size

# `PeerWatch` finds a rank that is gone much sooner. This ends the waits that it cannot see.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """One rank's view of all ranks; with one rank, every operation is local and free."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """The group that collectives run on; None: all ranks, over the device's own backend."""
    background_group: dist.ProcessGroup | None = None
    """For the threads that save."""
    control_group: dist.ProcessGroup | None = None
    """For what the loops agree on beside their collectives."""

    def in_background(self) -> "World":
        """Return the same ranks for another thread, which must not share the loop's group."""
        return replace(self, device=torch.device("cpu"), group=self.background_group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def node_ranks(self) -> range:
        """The ranks of this machine, which launchers number one after the other."""
        first = self.rank - self.local_rank
        return range(first, min(first + local_world_size(), self.world_size))

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def begin_sum(self, number: float) -> Callable[[], float]:
        """Begin to add `number` over all ranks; return what waits for the sum and returns it.

        The hosts do it among themselves, beside the devices' collectives.
        """
        total = torch.tensor([number])
        work = dist.all_reduce(total, group=self.control_group, async_op=True)
        assert work is not None

        def wait() -> float:
            work.wait()
            return total.item()

        return wait

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Write rank 0's `tensor` into that of every rank."""
        if self.world_size > 1:
            # By its bytes: gloo sends no bools.
            dist.broadcast(tensor.view(torch.uint8), src=0, group=self.group)

    def barrier(self) -> None:
        if self.world_size > 1:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            # NCCL's barrier runs on a GPU and guesses which, unless it is named.
            dist.barrier(group=self.group, device_ids=device_ids)

    def all_gather_object(self, value: Any) -> list[Any]:  # noqa: ANN401
        """Return every rank's `value`, in rank order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            # NCCL takes the pickles through the GPU and makes the host wait: for set-up and saves,
            # not for every step.
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_to_main(self, value: Any) -> list[Any]:  # noqa: ANN401
        """Return every rank's `value` in rank order on rank 0, nothing on the others."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values or []

    def broadcast_object(self, value: Any) -> Any:  # noqa: ANN401
        """Return rank 0's `value` on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.group, device=self.device)
        return values[0]

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Run a block on all ranks; where it fails on one, raise the first error on every rank.

        Without it, the ranks that succeeded would wait for the failed one in their next collective.
        The block itself must hold no collective after a place that may raise.
        """
        error: DtrScaleError | None = None
        try:
            yield
        except DtrScaleError as caught:
            error = caught
        except Exception as caught:
            if self.world_size == 1:
                raise
            traceback.print_exc()  # it does not travel to the other ranks
            error = EngineError(f"rank {self.rank} failed: {type(caught).__name__}: {caught}")
        # Every rank comes here, failed or not. In rank order: all raise the same error.
        for verdict in self.all_gather_object(error):
            if verdict is not None:
                verdict.on_every_rank = True
                raise verdict

    def leave(self) -> None:
        """Take down the process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def join_world(*, needs_process_group: bool, device: str = "auto") -> World:
    """Return this process's place among the ranks that a launcher started.

    `device` is what `choose_device` takes.

    A plain `python` process is a world of one; DeepSpeed and FSDP want a process group even then
    (`needs_process_group`), so the variables that a launcher sets get their defaults here.
    """
    world_size = launched_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    own = choose_device(device, local_rank)
    if world_size > 1 or needs_process_group:
        defaults = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        store, rank, world_size = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        store.set_timeout(COLLECTIVE_TIMEOUT)
        if own.type == "cuda":
            refuse_shared_gpus(store, rank, world_size, gpu_name(own))
        with without_lines_of_gloo():
            dist.init_process_group(
                "nccl" if own.type == "cuda" else "gloo",
                store=PrefixStore("default_pg", store),
                rank=rank,
                world_size=world_size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=own if own.type == "cuda" else None,
            )
    world = World(launched_rank(), local_rank, world_size, own)
    if world_size == 1:
        return world
    # A group per thread: with two threads on one, runs crashed (3 of 3). Making a group is a
    # collective, so every rank does it here.
    return replace(world, background_group=_host_group(), control_group=_host_group())


def _host_group() -> dist.ProcessGroup:
    with without_lines_of_gloo():
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def without_lines_of_gloo() -> Iterator[None]:
    """Leave out of stdout what gloo's C++ prints of each group: how many ranks it has reached."""
    # No setting turns it off, and Python's stdout is not what it writes to.
    sys.stdout.flush()
    with tempfile.TemporaryFile() as printed:
        stdout = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.close(stdout)
            printed.seek(0)
            for line in printed:
                if not line.startswith(b"[Gloo] Rank"):
                    os.write(1, line)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
