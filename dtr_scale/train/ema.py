"""Average the weights over the steps, on each rank's pieces of the fp32 masters alone."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dtr_scale.engines.base import Average, Averaging, Engine, Piece


class EmaProfile(Protocol):
    """An average's profile: the weight of the past in each update."""

    @property
    def key(self) -> str:
        """Name of the average's tensors in checkpoints: "<key>/<parameter>"."""
        ...

    def decay(self, step: int) -> float:
        """Return the weight of the past in the update after training step `step`, 1, 2, ..."""
        ...

    def meta(self) -> dict[str, float]:
        """Return the profile as a checkpoint's meta keeps it."""
        ...


@dataclass(frozen=True)
class ConstantDecay:
    """ema <- d * ema + (1 - d) * master, from the initial weights on."""

    value: float
    is_first: bool = False

    @property
    def key(self) -> str:
        return "ema" if self.is_first else f"ema_{self.value:g}"

    def decay(self, step: int) -> float:
        return self.value

    def meta(self) -> dict[str, float]:
        return {"decay": self.value}


@dataclass(frozen=True)
class PowerFunction:
    """EDM2's profile (Karras et al., 2024, eq. 3): the past weighs as t^gamma.

    Its width grows with training: `sigma_rel` is its standard deviation as a share of the steps
    so far. Averages of any other width can be made of a few stored ones, see `combine`.
    """

    sigma_rel: float

    @property
    def key(self) -> str:
        return f"ema_power_{self.sigma_rel:g}"

    @property
    def gamma(self) -> float:
        return power_gamma(self.sigma_rel)

    def decay(self, step: int) -> float:
        # Eq. 127. It is 0 at step 1: what the network began with has no part in it.
        return (1 - 1 / step) ** (self.gamma + 1)

    def meta(self) -> dict[str, float]:
        return {"sigma_rel": self.sigma_rel}


class Ema:
    """Averages of one or more profiles, without communication or a full replica."""

    def __init__(self, engine: Engine, profiles: Sequence[EmaProfile]) -> None:
        self._engine = engine
        self._profiles = tuple(profiles)
        self._averages = [engine.new_average() for _ in profiles]
        self._histories: dict[str, list[dict[str, Any]]] = {}
        self.load({}, step=0, new=())

    @property
    def keys(self) -> list[str]:
        return [profile.key for profile in self._profiles]

    def meta(self) -> dict[str, list[dict[str, Any]]]:
        """Return how each average was made, by key: {"from_step": n, "decay" or "sigma_rel": x}.

        The first entry's step is where the average began, at the weights of then; a further entry
        is a change of its decay.
        """
        return dict(self._histories)

    def averaging(self, step: int) -> list[Averaging]:
        """Return what the update of training step `step`, the first of which is 1, does to each."""
        return [
            Averaging(average, 1.0 - profile.decay(step))
            for profile, average in zip(self._profiles, self._averages, strict=True)
        ]

    def load(
        self, histories: Mapping[str, list[dict[str, Any]]], step: int, new: Collection[str]
    ) -> None:
        """Go on at `step` with averages that were made as a checkpoint's `meta` tells.

        Those whose keys are in `new` were not stored and begin at the weights as they are now.
        """
        for profile, average in zip(self._profiles, self._averages, strict=True):
            key = profile.key
            # Without a history, the average is as old as the run.
            history = [] if key in new else histories.get(key, [{"from_step": 0, **profile.meta()}])
            if not history or history[-1] != history[-1] | profile.meta():
                history = [*history, {"from_step": step, **profile.meta()}]
            self._histories[key] = history
            if key in new:
                for value, master in zip(average.values, average.masters, strict=True):
                    value.copy_(master)

    def pieces(self) -> dict[str, Piece]:
        """Return this rank's part of all averages by key, as views."""
        return {
            f"{profile.key}/{name}": piece
            for profile, average in zip(self._profiles, self._averages, strict=True)
            for name, piece in average.pieces.items()
        }

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the network compute with the first average; afterwards all is as it was."""
        self._exchange(self._averages[0])
        try:
            yield
        finally:
            self._exchange(self._averages[0])

    @torch.no_grad()
    def _exchange(self, average: Average) -> None:
        # Piece by piece and in place: engines and checkpoints hold these tensors, and there may be
        # no room for another copy of the weights.
        masters = self._engine.masters()
        for name, piece in average.pieces.items():
            master = masters[name].data
            held = master.clone()
            master.copy_(piece.data)
            piece.data.copy_(held)
        self._engine.push_masters()


def power_gamma(sigma_rel: float) -> float:
    """Return the exponent of the power function of relative width `sigma_rel`, below 1/sqrt(12).

    From Karras et al. (2024), eq. 126: sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1.
    """
    # (gamma + 2)^2 (gamma + 3) = gamma^3 + 7 gamma^2 + 16 gamma + 12; the largest root, as in
    # EDM2's code.
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())
