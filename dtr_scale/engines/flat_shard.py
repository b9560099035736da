"""Hold what a rank updates of all flat groups in one buffer of each kind."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dtr_scale.engines.base import (
    ADAM_MOMENTS,
    AdamSettings,
    Piece,
    adam_state,
    build_optimizer,
    cut,
)
from dtr_scale.engines.flat_group import ALIGNMENT, FlatGroup


class FlatShard:
    """This rank's masters, gradients, moments and cast weights, group after group.

    So an update is a few passes over long buffers, however many blocks there are.
    """

    def __init__(
        self,
        groups: Sequence[FlatGroup],
        adam: AdamSettings,
        exchange: torch.dtype = torch.float32,
    ) -> None:
        self._groups = groups
        self.master = torch.cat([group.master for group in groups])
        # As ranks exchange it, and as Adam takes it.
        self.gradient = torch.cat([group.gradient for group in groups]).to(exchange)
        self._fp32_gradient = self.gradient.float()
        self.cast = torch.cat([group.cast for group in groups])
        buffers = (self.master, self.gradient, self.cast)
        for group, *parts in zip(groups, *map(self._split, buffers), strict=True):
            group.move(*parts)
        self.moments = {moment: torch.zeros_like(self.master) for moment in ADAM_MOMENTS}
        self.adam = self._build_adam(adam)

    def give_gradient(self) -> None:
        """Let Adam have the gradient that was exchanged."""
        if self._fp32_gradient is not self.gradient:
            self._fp32_gradient.copy_(self.gradient)

    def pieces(self) -> Iterator[dict[str, Piece]]:
        """Yield what this rank holds of each parameter."""
        for group, *moments in zip(
            self._groups, *map(self._split, self.moments.values()), strict=True
        ):
            yield from group.pieces(dict(zip(ADAM_MOMENTS, moments, strict=True)))

    def pieces_of(self, flat: Tensor) -> dict[str, Piece]:
        """Return by parameter the parts of a tensor that lies as the masters do."""
        found: dict[str, Piece] = {}
        for group, part in zip(self._groups, self._split(flat), strict=True):
            found |= group.pieces_of(part)
        return found

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return flat.split([group.master.numel() for group in self._groups])

    def _build_adam(self, settings: AdamSettings) -> torch.optim.AdamW:
        """Return the optimizer of the masters, whose gradients and moments are in the buffers."""
        parts = [
            (name, start, nn.Parameter(cut(self.master, start, numel)))
            for name, start, numel in self.runs()
        ]
        adam = build_optimizer(((name, part) for name, _, part in parts), {"exempt"}, settings)
        for _, start, part in parts:
            part.grad = cut(self._fp32_gradient, start, part.numel())
            state = adam_state(adam, part)
            for moment, values in self.moments.items():
                state[moment] = cut(values, start, part.numel())
        return adam

    def decays(self) -> Tensor | None:
        """Return the weight decay of each row of 64 elements, [rows, 1]; None if all are 0."""
        decay = max(group["weight_decay"] for group in self.adam.param_groups)
        rows = [
            torch.full((numel // ALIGNMENT, 1), decay if kind == "decayed" else 0.0)
            for kind, _, numel in self.runs()
        ]
        return torch.cat(rows).to(self.master.device) if decay else None

    def runs(self) -> Iterator[tuple[str, int, int]]:
        """Yield "decayed" or "exempt", the start and the length of each run that decays alike."""
        kind, start, end = "decayed", 0, 0
        for group in self._groups:
            rest = group.master.numel() - group.num_decayed
            for found, numel in (("decayed", group.num_decayed), ("exempt", rest)):
                if found != kind and numel:
                    if end > start:
                        yield kind, start, end - start
                    kind, start = found, end
                end += numel
        yield kind, start, end - start
