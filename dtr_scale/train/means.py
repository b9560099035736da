"""Take the mean of the losses since the journal's last record."""

import math
from collections.abc import Mapping
from typing import Any

from dtr_scale.tracking.journal import Record


class LossMeans:
    """Means of mse, of vb and of their sum, over the steps since the last one that was logged.

    One sample of the cosine schedule's last timestep, whose beta is cut off, or of t = 0 can make a
    loss of 0.3 one of 19.6, so single steps tell little. The sums are part of a checkpoint: the
    journal of a resumed run is the same to the last bit.
    """

    def __init__(self) -> None:
        self._restart()

    def add(self, mse: float, vb: float) -> None:
        """Count a step by the means of its global batch."""
        # Not when the record was made: a save of that step is ranked by the same means.
        if self._is_logged:
            self._restart()
        if not math.isfinite(mse + vb):
            return  # its update was skipped, and no mean would survive it
        self._num_steps += 1
        self._mse += mse
        self._vb += vb

    def record(self) -> Record:
        """Return the journal's figures; nan where no step's loss was finite."""
        num_steps = self._num_steps or math.nan
        mse, vb = self._mse / num_steps, self._vb / num_steps
        return {"loss_mean": mse + vb, "mse_mean": mse, "vb_mean": vb}

    def close(self) -> None:
        """Let the next step begin anew: this one was logged."""
        self._is_logged = True

    def meta(self) -> dict[str, Any]:
        """Return the sums for a checkpoint's meta, whose JSON keeps every bit of them."""
        return {
            "num_steps": self._num_steps,
            "mse": self._mse,
            "vb": self._vb,
            "is_logged": self._is_logged,
        }

    def load(self, meta: Mapping[str, Any]) -> None:
        """Go on from stored sums; from none where a checkpoint has none."""
        self._restart()
        if meta:
            self._num_steps, self._is_logged = meta["num_steps"], meta["is_logged"]
            self._mse, self._vb = meta["mse"], meta["vb"]

    def _restart(self) -> None:
        self._num_steps, self._mse, self._vb = 0, 0.0, 0.0
        self._is_logged = False
