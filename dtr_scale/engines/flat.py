"""Train with Adam's state sharded over ranks as in ZeRO-1, for networks that fit a GPU.

Each block, and all that is outside of blocks, has one buffer of weights and one of gradients
(`flat_group.py`). A block's gradients are exchanged while the backward goes on below it, and its
updated weights are awaited by its next forward alone. Nothing in a step makes the host wait for a
GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from dtr_scale.engines.base import (
    ADAM_MOMENTS,
    AdamSettings,
    Average,
    Averaging,
    Engine,
    Judge,
    Piece,
    undecayed,
)
from dtr_scale.engines.flat_group import ALIGNMENT, FlatGroup, FlatWeights
from dtr_scale.engines.flat_shard import FlatShard
from dtr_scale.engines.flat_update import FusedUpdate
from dtr_scale.engines.graphs import Repeated
from dtr_scale.engines.world import World
from dtr_scale.engines.wrap import wrap_call


class FlatEngine(Engine):
    """Whole weights and gradients on each rank, 1/W of the masters and moments.

    With `graphs` a micro-step is repeated from what was recorded of it. Then weights are awaited
    before its forward and gradients exchanged after its backward: what other streams do is no part
    of a graph.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        blocks: Sequence[nn.Module],
        world: World,
        grad_clip: float | None = None,
        precision: str = "bf16",
        exchange: str = "fp32",
        compiled: bool = False,
        graphs: Repeated | None = None,
        **adam: Unpack[AdamSettings],
    ) -> None:
        self._world = world
        self._graphs = graphs
        self._max_norm = grad_clip
        self._is_last = True
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # In forward order, what is outside of blocks first: its forward begins before theirs, and
        # its backward ends after them.
        self._groups: list[FlatGroup] = []
        self._outside: list[FlatWeights] = []
        self._frozen: list[FlatWeights] = []
        exempt = undecayed(network, adam)
        frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad}
        for block, parameters in _parts(network, blocks):
            group = FlatGroup(parameters, world=world, dtype=dtype, exempt=exempt)
            self._groups.append(group)
            if block is None:
                self._outside.append(group)
            else:
                # Around compiled graphs and recomputation: it is called once per forward.
                wrap_call(block, partial(self._call_block, group))
        if frozen:
            self._frozen.append(FlatWeights(frozen, world=world, dtype=dtype))
        self._outside += self._frozen
        self._weights = list(dict.fromkeys([*self._outside, *self._groups]))
        self.network = network.to(world.device)  # buffers: the parameters are there
        network.register_forward_pre_hook(self._before_network)
        # One rank exchanges nothing: its gradient is the buffer that micro-steps are added in.
        in_bf16 = exchange == "bf16" and world.world_size > 1
        summed_in = torch.bfloat16 if in_bf16 else torch.float32
        self._shard = FlatShard(self._groups, adam, summed_in)
        self._adam = self._shard.adam
        # On a CPU PyTorch's own kernels do, without the half minute of a compiler.
        self._fused = FusedUpdate(self._shard, grad_clip) if compiled else None
        self._pieces: dict[str, Piece] = {}
        for pieces in (*self._shard.pieces(), *_unmoved(self._frozen)):
            self._pieces |= pieces

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, step: int) -> Tensor:
        return self.network(x_t, t, y, step).float()

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        self._is_last = last
        yield

    def accumulate(
        self,
        losses_of: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        *,
        last: bool,
        end_forward: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, ...]:
        if self._graphs is None:
            return super().accumulate(losses_of, inputs, last=last, end_forward=end_forward)
        for weights in self._weights:
            weights.wait()
        # The first of a step writes to the buffers of gradients, the others add to them.
        first = self._groups[0].is_empty
        with self.micro_step(last=False):  # it exchanges nothing by itself
            losses = self._graphs(partial(self._losses_and_gradient, losses_of), inputs, first)
        end_forward()
        for group in reversed(self._groups):
            group.is_empty = False  # a replay does not tell
            if last:
                group.reduce()
        return losses

    def _losses_and_gradient(
        self, losses_of: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        losses = losses_of(*inputs)
        self.backward(losses[-1])
        return losses

    def backward(self, loss: Tensor) -> None:
        self._uncollected = set(self._groups)
        self._unreduced = list(self._groups) if self._is_last else []
        loss.backward()
        # What is outside of blocks, and a block whose input needs no gradient.
        for group in list(self._uncollected):
            self._collect(group)
        # A block's gradients were all there when its input's was. One that came later would be
        # missing in the sum.
        late = [name for group in self._groups for name in group.uncollected()]
        assert not late, late

    def step(self, judge: Judge | None = None, averaging: Sequence[Averaging] = ()) -> Tensor:
        if self._fused is None:
            return super().step(judge, averaging)
        norm = self._gradient_norm()
        skip = self._heed(judge, norm)
        self._wait_for_weights()
        self._fused(norm, skip, averaging)
        self._gather()
        if self._frozen:
            # A start may have replaced them, and their averages have not come to it yet.
            rest = (Average(a.masters[1:], a.values[1:], {}) for a, _ in averaging)
            self.average(map(Averaging, rest, (weight for _, weight in averaging)))
        return norm

    def _update(self, judge: Judge | None) -> Tensor:
        norm = self._gradient_norm()
        self._shard.give_gradient()
        if self._max_norm is not None:
            # A factor of nan would stay in the padding for ever, and with it in every later norm.
            parts = [part for group in self._adam.param_groups for part in group["params"]]
            nn.utils.clip_grads_with_norm_(parts, self._max_norm, norm.nan_to_num(nan=0.0))
        self._heed(judge, norm)
        self._adam.step()
        self._push()
        return norm

    def _gradient_norm(self) -> Tensor:
        """Return the norm [] of the whole gradient, once all exchanges are done."""
        for group in self._groups:
            group.wait_for_gradient()
        # Row by row: on a CPU one fp32 sum over 20M elements is off by a thousandth, and in fp64
        # all of it would take ten times as long.
        rows = torch.linalg.vector_norm(
            self._shard.gradient.view(-1, ALIGNMENT), dim=1, dtype=torch.float32
        )
        norm = torch.linalg.vector_norm(rows, dtype=torch.float64)
        if self._world.world_size > 1:
            # Of shards, which have no element in common. It stays on the device.
            norm = self._world.all_reduce_sum(norm.square()).sqrt()
        return norm

    def new_average(self) -> Average:
        masters = [self._shard.master, *(weights.master for weights in self._frozen)]
        values = [master.clone() for master in masters]
        pieces = self._shard.pieces_of(values[0])
        for weights, held in zip(self._frozen, values[1:], strict=True):
            pieces |= weights.pieces_of(held)
        return Average(masters, values, pieces)

    def push_masters(self) -> None:
        self._push()
        for weights in self._frozen:
            weights.push()

    @torch.no_grad()
    def _push(self) -> None:
        """Cast the masters, and begin to gather all ranks' weights."""
        self._wait_for_weights()
        self._shard.cast.copy_(self._shard.master)
        self._gather()

    def _wait_for_weights(self) -> None:
        # A gather that nobody has waited for reads what is cast.
        for group in self._groups:
            group.wait()

    def _gather(self) -> None:
        # In forward order: the first block can begin while the last one's weights are on their way.
        for group in self._groups:
            group.gather()

    def _before_network(self, network: nn.Module, inputs: Any) -> None:  # noqa: ANN401
        """Wait for the weights outside of blocks; for all of them where no gradients are wanted."""
        # Such a forward may pass over a block (an expert without samples). It also is the last one
        # before a run ends, which no collective may outlive.
        for weights in self._outside if torch.is_grad_enabled() else self._weights:
            weights.wait()

    def _call_block(
        self,
        group: FlatGroup,
        call: Callable[..., Any],
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        group.wait()
        tokens = args[0]
        if torch.is_grad_enabled() and tokens.requires_grad:
            # One hook per block: autograd calls it with the gradient of the block's input. All that
            # the forward computed later, the whole block, has had its backward by then, since
            # autograd takes what is ready in the reverse order of the forward.
            tokens.register_hook(lambda gradient: self._collect(group))
        return call(*args, **kwargs)

    def _collect(self, group: FlatGroup) -> None:
        """Take a group's gradients, and in the last micro-step exchange those whose turn it is."""
        group.collect()
        self._uncollected.remove(group)
        # In reverse forward order whatever the order of hooks, so that ranks whose samples go
        # through different parts of a network begin the same collectives one after the other.
        while self._unreduced and self._unreduced[-1] not in self._uncollected:
            self._unreduced.pop().reduce()


def _unmoved(frozen: Sequence[FlatWeights]) -> Iterator[dict[str, Piece]]:
    """Yield what this rank holds of frozen parameters, whose moments stay zero."""
    for weights in frozen:
        yield from weights.pieces({m: torch.zeros_like(weights.master) for m in ADAM_MOMENTS})


def _parts(
    network: nn.Module, blocks: Sequence[nn.Module]
) -> Iterator[tuple[nn.Module | None, dict[str, nn.Parameter]]]:
    """Yield the trained parameters by name: those outside of blocks (None), then each block's."""
    owners = {parameter: block for block in blocks for parameter in block.parameters()}
    for owner in (None, *blocks):
        found = {
            name: parameter
            for name, parameter in network.named_parameters()
            if parameter.requires_grad and owners.get(parameter) is owner
        }
        if found:
            yield owner, found
