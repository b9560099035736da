"""Hold the weights and gradients of a part of the network in flat buffers, sharded over ranks."""

from collections.abc import Iterator, Mapping, Set

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtr_scale.engines.base import Piece, cut, cut_pieces
from dtr_scale.engines.world import World

ALIGNMENT = 64
"""Elements that a parameter begins at a multiple of: 128 bytes in bf16. Matrix products want 16
bytes, and the compiler would copy a weight that is not aligned at every call."""


class FlatWeights:
    """Parameters as views of one buffer; each rank keeps fp32 masters of an equal part of it.

    The buffer is in the dtype that the network computes in. Its end is padded with zeros, so that
    all ranks' shards are of one size. Parameters that are `exempt` from decay by name come last.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        world: World,
        dtype: torch.dtype,
        exempt: Set[str] = frozenset(),
    ) -> None:
        self._names = sorted(parameters, key=lambda name: name in exempt)  # else in their order
        self.parameters = [parameters[name] for name in self._names]
        self._world = world
        self._starts, end = _lay_out(self.parameters)
        self._shard_size = -(-end // (ALIGNMENT * world.world_size)) * ALIGNMENT
        initial = torch.zeros(self._shard_size * world.world_size)
        for view, parameter in zip(self.views(initial), self.parameters, strict=True):
            view.copy_(parameter.detach())
        # From the fp32 values, before a cast; a copy of its own in fp32 too, so that masters may be
        # written to (by a load, an average that is swapped in) while weights are on their way.
        self.master = self._shard(initial).to(world.device, copy=True)
        self._use(initial.to(world.device, dtype))
        self.cast = self._shard(self._weights)
        self.num_decayed = self._find_decayed(exempt)
        self._gather: dist.Work | None = None

    def _use(self, weights: Tensor) -> None:
        """Let the parameters be views of this buffer."""
        self._weights = weights
        for view, parameter in zip(self.views(weights), self.parameters, strict=True):
            parameter.data = view

    def _find_decayed(self, exempt: Set[str]) -> int:
        """Return how many elements of this rank's masters are decayed: its first ones."""
        begin = self._world.rank * self._shard_size
        num_decayed = sum(name not in exempt for name in self._names)
        end = [*self._starts, self._shard_size * self._world.world_size][num_decayed]
        return min(max(end - begin, 0), self._shard_size)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return each parameter's part of a buffer of this layout, in the parameter's shape."""
        return [
            flat[start : start + parameter.numel()].view(parameter.shape)
            for start, parameter in zip(self._starts, self.parameters, strict=True)
        ]

    @torch.no_grad()
    def push(self) -> None:
        """Cast this rank's masters, and begin to gather the weights of all ranks: a collective."""
        self.wait()  # a gather that nobody has waited for reads what is cast
        self.cast.copy_(self.master)
        self.gather()

    def gather(self) -> None:
        """Begin to gather the weights that all ranks have cast: a collective."""
        if self._world.world_size > 1:
            # Under NCCL it runs on a stream of NCCL's, after what is queued on this one.
            self._gather = _begun(
                dist.all_gather_into_tensor(
                    self._weights, self.cast, group=self._world.group, async_op=True
                )
            )

    def wait(self) -> None:
        """Let what is called next see the weights that were last pushed."""
        if self._gather is not None:
            # Under NCCL the stream waits and not the host. All that reads weights is queued on
            # this stream, so one wait is enough.
            self._gather.wait()
            self._gather = None

    def pieces(self, state: dict[str, Tensor]) -> Iterator[dict[str, Piece]]:
        """Yield what this rank holds of each parameter, given the Adam state of its masters."""
        for name, shape, offset, start, numel in self._held():
            yield cut_pieces(name, shape, offset, self.master, state, start, numel)

    def pieces_of(self, flat: Tensor) -> dict[str, Piece]:
        """Return by parameter the parts of a tensor that lies as this rank's masters do."""
        return {
            name: Piece(tuple(shape), offset, cut(flat, start, numel))
            for name, shape, offset, start, numel in self._held()
        }

    def _held(self) -> Iterator[tuple[str, torch.Size, int, int, int]]:
        """Yield the parameters that this rank holds elements of: name, shape, where and how many.

        They begin at an offset in the parameter, and at a start in this rank's masters.
        """
        begin = self._world.rank * self._shard_size
        end = begin + self._shard_size
        for name, start, parameter in zip(self._names, self._starts, self.parameters, strict=True):
            first = max(start, begin)
            numel = min(start + parameter.numel(), end) - first
            if numel > 0:  # else other ranks hold all of it
                yield name, parameter.shape, first - start, first - begin, numel

    def _shard(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self._world.rank * self._shard_size, self._shard_size)


class FlatGroup(FlatWeights):
    """Flat weights that are trained, with a flat fp32 buffer of their gradients.

    They are added up over micro-steps in fp32, and summed over ranks in the dtype of `gradient`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        world: World,
        dtype: torch.dtype,
        exempt: Set[str] = frozenset(),
    ) -> None:
        super().__init__(parameters, world=world, dtype=dtype, exempt=exempt)
        # The padding stays zero: so do its moments, and its masters.
        self._gradients = torch.zeros_like(self._weights, dtype=torch.float32)
        self._gradient_views = self.views(self._gradients)
        alone = world.world_size == 1
        # Of this rank's shard, summed over all ranks: what the optimizer is given.
        self.gradient = self._gradients if alone else torch.zeros_like(self.master)
        self.is_empty = True
        """Whether the buffer holds nothing of this step."""
        self._reduction: dist.Work | None = None
        self._sent: Tensor | None = None

    def move(self, master: Tensor, gradient: Tensor, cast: Tensor) -> None:
        """Keep this rank's masters, gradient and cast weights in these, which begin as they are."""
        self.master, self.gradient, self.cast = master, gradient, cast
        if self._world.world_size == 1:
            self._use(cast)
            self._gradients = gradient
            self._gradient_views = self.views(gradient)

    def collect(self) -> None:
        """Add the parameters' gradients to the buffer, and free them.

        One pass over a block: a view of the buffer as `grad` would take a kernel per parameter, and
        another to clear it first.
        """
        pairs = zip(self._gradient_views, self.parameters, strict=True)
        found = [(view, p.grad) for view, p in pairs if p.grad is not None]
        if self.is_empty and len(found) < len(self.parameters):
            self._gradients.zero_()  # what has no gradient now keeps none of the step before
        # Private in torch. A loop does the same, with a launch per tensor.
        add = torch._foreach_copy_ if self.is_empty else torch._foreach_add_  # pyright: ignore
        if found:  # else the block was not called
            add([view for view, _ in found], [gradient for _, gradient in found])
        self.is_empty = False
        for parameter in self.parameters:
            parameter.grad = None

    def uncollected(self) -> list[str]:
        """Return the parameters that have been given a gradient since."""
        named = zip(self._names, self.parameters, strict=True)
        return [name for name, parameter in named if parameter.grad is not None]

    def reduce(self) -> None:
        """Begin to sum the buffers of all ranks, each rank's shard for itself: a collective."""
        if self._world.world_size > 1:
            # On NCCL's own stream, which waits for what is queued here: for the gradients above.
            # It may run while the backward goes on, since nothing writes to the buffer until the
            # step has waited; nor is a cast of it given back before.
            self._sent = self._gradients.to(self.gradient.dtype)
            self._reduction = _begun(
                dist.reduce_scatter_tensor(
                    self.gradient, self._sent, group=self._world.group, async_op=True
                )
            )

    def wait_for_gradient(self) -> None:
        """Let what is called next see the gradient of all ranks. The buffer is free afterwards."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = self._sent = None
        self.is_empty = True


def _lay_out(parameters: list[nn.Parameter]) -> tuple[list[int], int]:
    """Return where each parameter begins in a flat buffer, and where the last one ends."""
    starts, end = [], 0
    for parameter in parameters:
        starts.append(end)
        end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    return starts, end


def _begun(work: dist.Work | None) -> dist.Work:
    assert work is not None  # None is for processes that are not of the group
    return work
