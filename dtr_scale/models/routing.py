"""Routing masks of Denoising Task Routing (paper, section 4.3): the channels of a timestep."""

import numpy as np
import torch
from torch import Tensor

from dtr_scale.errors import ConfigError

ROUTING_KINDS = ("none", "dtr", "dtr_eq4")


def routing_windows(
    kind: str, *, num_timesteps: int, num_channels: int, alpha: float = 4.0, beta: float = 0.8
) -> tuple[Tensor, Tensor]:
    """Return start [T] and stop [T], int64: timestep t uses the channels start[t] <= c < stop[t].

    "dtr" is the released code (pseudo code 1), "dtr_eq4" the paper's equation 4 with t and c
    counted from 0, "none" uses every channel. Raises ConfigError for anything else, for
    alpha <= 0 and for a beta that leaves no channel.
    """
    if kind not in ROUTING_KINDS:
        accepted = ", ".join(ROUTING_KINDS)
        raise ConfigError(f"model.routing.type: {kind!r} is not a routing; accepted: {accepted}")
    if kind == "none":
        start, stop = np.zeros(num_timesteps), np.full(num_timesteps, num_channels)
        return _int64(start), _int64(stop)
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"model.routing.alpha: {alpha} is not accepted; give a number above 0")
    if not (0 < beta <= 1 and int(beta * num_channels) > 0):
        raise ConfigError(
            f"model.routing.beta: {beta} is not accepted; give a number in (0, 1] that leaves "
            f"at least one of {num_channels} channels"
        )
    width = int(beta * num_channels)
    num_idle = num_channels - width
    if kind == "dtr":
        start = np.round(np.linspace(0, 1, num_timesteps) ** alpha * num_idle)
        return _int64(start), _int64(start + width)
    edge = np.floor(num_idle * (np.arange(num_timesteps + 1) / num_timesteps) ** alpha)  # eq. 4
    return _int64(edge[:-1]), _int64(edge[1:] + width)


def routing_mask(
    kind: str, num_timesteps: int, num_channels: int, alpha: float = 4.0, beta: float = 0.8
) -> Tensor:
    """Return the masks m_t of all timesteps, bool [T, C]; see `routing_windows` for the kinds."""
    start, stop = routing_windows(
        kind, num_timesteps=num_timesteps, num_channels=num_channels, alpha=alpha, beta=beta
    )
    return window_mask(start, stop, num_channels)


def window_mask(start: Tensor, stop: Tensor, num_channels: int) -> Tensor:
    """Return bool [N, C], true where start[n] <= c < stop[n]."""
    c = torch.arange(num_channels, device=start.device)
    return (c >= start[:, None]) & (c < stop[:, None])


def _int64(values: np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
