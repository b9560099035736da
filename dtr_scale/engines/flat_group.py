"""Hold the weights and gradients of a part of the network in flat buffers, sharded over ranks."""

from collections.abc import Iterator, Mapping, Set

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtr_scale.engines.base import ADAM_MOMENTS, Piece, adam_state, cut, cut_pieces
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
        self._weights = initial.to(world.device, dtype)
        # From the fp32 values, before a cast; a copy of its own in fp32 too, so that masters may be
        # written to (by a load, an average that is swapped in) while weights are on their way.
        self.master = nn.Parameter(self._shard(initial).to(world.device, copy=True))
        for view, parameter in zip(self.views(self._weights), self.parameters, strict=True):
            parameter.data = view
        self._parts = list(self._cut_by_decay(exempt))
        self._gather: dist.Work | None = None

    def parts(self) -> list[tuple[str, nn.Parameter]]:
        """Return what the optimizer is given: the masters, cut in two where decay ends.

        Each with the name of its first parameter, which tells whether it is decayed.
        """
        return [(name, part) for name, _, part in self._parts]

    def adam_state(self, adam: torch.optim.AdamW) -> dict[str, Tensor]:
        """Return the moments of all masters; those of each part are views of them."""
        whole = {moment: torch.zeros_like(self.master.detach()) for moment in ADAM_MOMENTS}
        for _, start, part in self._parts:
            state = adam_state(adam, part)
            for moment, values in whole.items():
                state[moment] = cut(values, start, part.numel())
        return whole

    def _cut_by_decay(self, exempt: Set[str]) -> Iterator[tuple[str, int, nn.Parameter]]:
        """Yield the first name, the place in this rank's masters and the masters of each part."""
        decayed = [name for name in self._names if name not in exempt]
        begin = self._world.rank * self._shard_size
        end = [*self._starts, self._shard_size * self._world.world_size][len(decayed)]
        cut_at = min(max(end - begin, 0), self._shard_size)
        for names, start, stop in (
            (decayed, 0, cut_at),
            (self._names[len(decayed) :], cut_at, self._shard_size),
        ):
            if not names or start == stop:
                continue
            is_whole = stop - start == self._shard_size
            yield (
                names[0],
                start,
                self.master if is_whole else nn.Parameter(cut(self.master, start, stop - start)),
            )

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return each parameter's part of a buffer of this layout, in the parameter's shape."""
        return [
            flat[start : start + parameter.numel()].view(parameter.shape)
            for start, parameter in zip(self._starts, self.parameters, strict=True)
        ]

    @torch.no_grad()
    def push(self) -> None:
        """Cast this rank's masters, and begin to gather the weights of all ranks: a collective."""
        self.wait()  # a gather that nobody has waited for writes to the same buffer
        own = self._shard(self._weights)
        own.copy_(self.master)
        if self._world.world_size > 1:
            # In place: `own` lies in the output where this rank's part belongs. Under NCCL it runs
            # on a stream of NCCL's, after what is queued on this one.
            self._gather = _begun(
                dist.all_gather_into_tensor(
                    self._weights, own, group=self._world.group, async_op=True
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
        begin = self._world.rank * self._shard_size
        end = begin + self._shard_size
        for name, start, parameter in zip(self._names, self._starts, self.parameters, strict=True):
            first = max(start, begin)
            numel = min(start + parameter.numel(), end) - first
            if numel > 0:  # else other ranks hold all of it
                yield cut_pieces(
                    name,
                    parameter.shape,
                    first - start,
                    self.master,
                    state,
                    first - begin,
                    numel,
                )

    def _shard(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self._world.rank * self._shard_size, self._shard_size)


class FlatGroup(FlatWeights):
    """Flat weights that are trained, with a flat fp32 buffer of their gradients.

    Gradients are added up over micro-steps in fp32, and exchanged in fp32 as under every engine.
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
        self.gradient = self._gradients if alone else torch.zeros_like(self.master.detach())
        self.master.grad = self.gradient
        for _, start, part in self._parts:
            part.grad = cut(self.gradient, start, part.numel())
        self._is_empty = True
        self._reduction: dist.Work | None = None

    def collect(self) -> None:
        """Add the parameters' gradients to the buffer, and free them.

        One pass over a block: a view of the buffer as `grad` would take a kernel per parameter, and
        another to clear it first.
        """
        pairs = zip(self._gradient_views, self.parameters, strict=True)
        found = [(view, p.grad) for view, p in pairs if p.grad is not None]
        if self._is_empty and len(found) < len(self.parameters):
            self._gradients.zero_()  # what has no gradient now keeps none of the step before
        # Private in torch. A loop does the same, with a launch per tensor.
        add = torch._foreach_copy_ if self._is_empty else torch._foreach_add_  # pyright: ignore
        if found:  # else the block was not called
            add([view for view, _ in found], [gradient for _, gradient in found])
        self._is_empty = False
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
            # step has waited.
            self._reduction = _begun(
                dist.reduce_scatter_tensor(
                    self.gradient, self._gradients, group=self._world.group, async_op=True
                )
            )

    def wait_for_gradient(self) -> None:
        """Let what is called next see the gradient of all ranks. The buffer is free afterwards."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
        self._is_empty = True


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
