"""Exponential moving average of the weights, on each rank's fp32 fragments alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dtr_scale.engines.base import Engine


class Ema:
    """ema <- decay * ema + (1 - decay) * master, without communication or a full replica."""

    def __init__(self, engine: Engine, *, decay: float) -> None:
        self._engine = engine
        self._decay = decay
        self._masters = [fragment.master for fragment in engine.fragments()]
        self.values = [master.clone() for master in self._masters]

    @torch.no_grad()
    def update(self) -> None:
        foreach_lerp_ = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
        foreach_lerp_(self.values, self._masters, 1.0 - self._decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the network compute with the averaged weights; afterwards all is as it was."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, master in zip(self.values, self._masters, strict=True):
            held = master.clone()
            master.copy_(average)
            average.copy_(held)
        self._engine.push_masters()
