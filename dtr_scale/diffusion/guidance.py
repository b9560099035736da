"""Guide a network without a classifier (Ho & Salimans, 2022)."""

from typing import Literal, Protocol

import torch
from torch import Tensor

from dtr_scale.errors import ConfigError


class ConditionalFn(Protocol):
    """f(x [N, C, H, W], t int [N], y, training step) -> [N, 2C or C, H, W]."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, step: int | None = None) -> Tensor: ...


class LabelledModel(ConditionalFn, Protocol):
    """A network of labels y int [N], or text tokens [N, L, D], that knows a null condition."""

    in_channels: int
    class_dropout_prob: float

    def null_like(self, y: Tensor) -> Tensor:
        """Return conditions like y, [N] or [N, L, D], that say nothing."""
        ...


def cfg_model(
    model: LabelledModel,
    cfg_scale: float = 1.5,
    cfg_channels: int | Literal["all"] | None = None,
    cfg_interval: tuple[float, float] | None = None,
    null_condition: Tensor | None = None,
) -> ConditionalFn:
    """Return the guided network f(x, t, y) -> [N, 2C or C, H, W], one doubled forward.

    eps = eps(null) + cfg_scale (eps(y) - eps(null)) in the first `cfg_channels` channels of eps
    (None or "all": in all of them); the other channels are those of y. DiT guides 3 of 4 channels,
    the released DTR code all 4. With `cfg_interval` = (lo, hi), samples at original timesteps
    lo <= t < hi alone are guided (Kynkäänniemi et al., 2024). `null_condition` [L, D] is the text
    that training put in the place of dropped ones, where that is not `model.null_like`. Raises
    ConfigError for a model without a null condition and for channels or an interval that cannot be.
    """
    # The formula is eps(y) then: half the work, and no null condition is needed.
    if cfg_scale == 1.0:
        return model
    if not model.class_dropout_prob > 0:
        raise ConfigError(
            f"cfg_scale = {cfg_scale}: needs a model trained with a null label; "
            "set model.class_dropout_prob above 0 and train, or give cfg_scale = 1.0"
        )
    channels = model.in_channels if cfg_channels in (None, "all") else cfg_channels
    if not 1 <= channels <= model.in_channels:
        raise ConfigError(
            f"cfg_channels = {channels}: not accepted; give 1 to {model.in_channels} or 'all'"
        )
    first, stop = cfg_interval or (0, float("inf"))
    if not 0 <= first < stop:
        raise ConfigError(
            f"cfg_interval = {[first, stop]}: not accepted; give timesteps [lo, hi] with "
            "0 <= lo < hi, for example [200, 700]"
        )

    def guided_model(x: Tensor, t: Tensor, y: Tensor, step: int | None = None) -> Tensor:
        # One forward of twice the batch: weights are read, and gathered under FSDP, once.
        null_y = model.null_like(y) if null_condition is None else null_condition.expand_as(y)
        conditions = torch.cat([y, null_y.to(y)])
        # fp32: the difference of two near outputs loses most of bf16's digits.
        both = model(torch.cat([x, x]), torch.cat([t, t]), conditions, step).float()
        conditional, null = both.chunk(2)  # [N, 2C or C, H, W] each
        eps, rest = conditional[:, :channels], conditional[:, channels:]
        eps_null = null[:, :channels]
        guided = eps_null + cfg_scale * (eps - eps_null)
        # By sample and on the device: a branch on t would make the host wait for it.
        inside = ((t >= first) & (t < stop)).view(-1, 1, 1, 1)
        return torch.cat([torch.where(inside, guided, eps), rest], dim=1)

    return guided_model
