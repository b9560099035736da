"""Classifier-free guidance (Ho & Salimans, 2022)."""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from dtr_scale.errors import ConfigError


class LabelledModel(Protocol):
    """A network of (x, t, y) that was trained with a null label."""

    in_channels: int
    null_label: int
    class_dropout_prob: float

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor: ...


def cfg_model(
    model: LabelledModel, cfg_scale: float = 1.5, cfg_channels: int | Literal["all"] | None = 4
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return f(x, t, y) -> [N, 2C or C, H, W], the guided network in one doubled forward.

    eps = eps(null) + cfg_scale (eps(y) - eps(null)) in the first `cfg_channels` channels of eps
    (None or "all": in all of them); the other channels are those of y. DiT guides 3 of 4 channels,
    the released DTR code all 4. Raises ConfigError for a model without a null label.
    """
    if cfg_scale == 1.0:
        return model
    if not model.class_dropout_prob > 0:
        raise ConfigError(
            f"cfg_scale: {cfg_scale} needs a model trained with a null label; "
            "set model.class_dropout_prob above 0 and train, or use cfg_scale 1.0"
        )
    guided = model.in_channels if cfg_channels in (None, "all") else cfg_channels
    if not 1 <= guided <= model.in_channels:
        raise ConfigError(
            f"cfg_channels: {guided} is not accepted; give 1 to {model.in_channels} or 'all'"
        )

    def guided_model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        labels = torch.cat([y, torch.full_like(y, model.null_label)])
        # fp32: the difference of two near outputs loses most of bf16's digits.
        both = model(torch.cat([x, x]), torch.cat([t, t]), labels).float()
        conditional, null = both.chunk(2)
        eps, rest = conditional[:, :guided], conditional[:, guided:]
        eps_null = null[:, :guided]
        return torch.cat([eps_null + cfg_scale * (eps - eps_null), rest], dim=1)

    return guided_model
