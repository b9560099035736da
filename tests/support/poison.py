"""Break the gradient of chosen steps of a training, under any engine."""

import math
from collections.abc import Callable
from typing import Any

from dtr_scale.train.trainer import Trainer

NAN = math.nan


def poison(
    trainer: Trainer, steps: Callable[[int, int], bool], factor: float = NAN, *, loss: bool = False
) -> None:
    """Multiply what is differentiated where `steps(step, rollbacks)`: the norm alone tells.

    With `loss` the losses as well.
    """
    healthy: Any = trainer._loss

    def broken(*args: Any) -> Any:
        losses = healthy(*args)
        if not steps(trainer.step + 1, trainer.guard.rollbacks):
            return losses
        if loss:
            losses = losses._replace(mse=losses.mse * factor)
        return losses._replace(share=losses.share * factor)

    replaced: Any = trainer
    replaced._loss = broken
