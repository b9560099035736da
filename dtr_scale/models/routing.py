"""Routing masks: the channels of a block that a timestep uses (paper, sections 4.2 and 4.3, F).

Masks are functions of integers and seeds. Kinds:

none         every channel
dtr          a window that slides with t, as the released code makes it (pseudo code 1)
dtr_eq4      the same by equation 4, with t and c counted from 0
cdtr         dtr over clusters of timesteps as tasks (appendix F)
ercddt       half of the channels for all, a segment of the other half per cluster (appendix F)
random       R-TR: other channels for each block and timestep (Strezoski et al., 2019)
max_roaming  random, then one channel is changed at every update until each timestep has visited
             all channels (Pascal et al., 2021)
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dtr_scale.errors import ConfigError
from dtr_scale.randomness import keyed_generator

WINDOW_KINDS = ("none", "dtr", "dtr_eq4", "cdtr")
ROUTING_KINDS = (*WINDOW_KINDS, "ercddt", "random", "max_roaming")

_NEVER = np.iinfo(np.int16).max  # the update at which a channel leaves that stays


def routing_windows(
    kind: str,
    *,
    num_timesteps: int,
    num_channels: int,
    alpha: float = 4.0,
    beta: float = 0.8,
    num_clusters: int = 8,
) -> tuple[Tensor, Tensor]:
    """Return start [T] and stop [T], int64: timestep t uses the channels start[t] <= c < stop[t].

    `kind` is one of WINDOW_KINDS. C_beta = int(beta C); `alpha` above 1 moves the window more at
    high timesteps. Raises ConfigError for another kind and for settings out of range.
    """
    check_routing(kind, num_timesteps, alpha, beta, num_clusters, update_every_steps=1)
    if kind not in WINDOW_KINDS:
        accepted = ", ".join(WINDOW_KINDS)
        raise ConfigError(f"model.routing.type: {kind!r} has no windows; these have: {accepted}")
    if kind == "none":
        return _int64(np.zeros(num_timesteps)), _int64(np.full(num_timesteps, num_channels))
    width = _num_active(num_channels, beta)
    num_idle = num_channels - width
    if kind == "dtr_eq4":
        time = np.arange(num_timesteps + 1) / num_timesteps
        edge = np.floor(num_idle * time**alpha)  # eq. 4
        return _int64(edge[:-1]), _int64(edge[1:] + width)
    num_tasks = num_timesteps if kind == "dtr" else num_clusters
    start = np.round(np.linspace(0, 1, num_tasks) ** alpha * num_idle)
    if kind == "cdtr":
        start = start[_cluster(num_timesteps, num_clusters)]
    return _int64(start), _int64(start + width)


def routing_mask(
    kind: str,
    num_timesteps: int,
    num_channels: int,
    alpha: float = 4.0,
    beta: float = 0.8,
    *,
    seed: int = 0,
    block: int = 0,
    step: int = 0,
    update_every_steps: int = 500,
    num_clusters: int = 8,
) -> Tensor:
    """Return the masks m_t of all timesteps, bool [T, C].

    `seed` and `block` matter to random and max_roaming; the training `step` and
    `update_every_steps` to max_roaming; `num_clusters` to cdtr and ercddt; `alpha` to windows.
    Raises ConfigError for an unknown kind and for settings out of range.
    """
    check_routing(kind, num_timesteps, alpha, beta, num_clusters, update_every_steps)
    if kind == "ercddt":
        return torch.tensor(_shared_and_own(num_timesteps, num_channels, num_clusters))
    if kind == "random":
        order = _channel_order(seed, block, num_timesteps, num_channels)
        mask = np.zeros((num_timesteps, num_channels), dtype=bool)
        np.put_along_axis(mask, order[:, : _num_active(num_channels, beta)], True, axis=1)
        return torch.tensor(mask)
    if kind == "max_roaming":
        enter, leave = roaming_updates(num_timesteps, num_channels, beta, seed=seed, block=block)
        return roaming_mask(enter, leave, step, update_every_steps)
    start, stop = routing_windows(
        kind,
        num_timesteps=num_timesteps,
        num_channels=num_channels,
        alpha=alpha,
        beta=beta,
        num_clusters=num_clusters,
    )
    return window_mask(start, stop, num_channels)


def window_mask(start: Tensor, stop: Tensor, num_channels: int) -> Tensor:
    """Return bool [N, C], true where start[n] <= c < stop[n]."""
    c = torch.arange(num_channels, device=start.device)
    return (c >= start[:, None]) & (c < stop[:, None])


def roaming_updates(
    num_timesteps: int, num_channels: int, beta: float, *, seed: int, block: int
) -> tuple[Tensor, Tensor]:
    """Return enter [T, C] and leave [T, C], int16: channel c is used by t in enter <= u < leave.

    u counts MaxRoaming's updates. Each swaps a random active channel for a random one that the
    timestep has not visited, as Pascal et al. do; after C - C_beta of them all were visited.
    """
    order = _channel_order(seed, block, num_timesteps, num_channels)
    width = _num_active(num_channels, beta)
    generator = keyed_generator(seed, "routing.leaving", block)
    places = generator.integers(width, size=(num_channels - width, num_timesteps))
    enter = np.zeros((num_timesteps, num_channels), dtype=np.int16)
    leave = np.full_like(enter, _NEVER)
    t = np.arange(num_timesteps)
    active = order[:, :width].copy()
    for update, (place, newcomer) in enumerate(zip(places, order[:, width:].T, strict=True), 1):
        leave[t, active[t, place]] = update
        enter[t, newcomer] = update
        active[t, place] = newcomer
    return torch.tensor(enter), torch.tensor(leave)


def roaming_mask(enter: Tensor, leave: Tensor, step: int, update_every_steps: int) -> Tensor:
    """Return MaxRoaming's mask at a training step, bool of the shape of `enter` and `leave`."""
    update = min(step // update_every_steps, _NEVER - 1)
    return (enter <= update) & (update < leave)


class Routing(nn.Module):
    """The masks of all routed blocks of a network, as tables over its timesteps.

    `num_channels` are the widths of the blocks in forward order; the other arguments are those of
    `routing_mask`. Blocks of one width share their windows. R-TR's masks are in the state dict
    (`mask_{block}`, bool [T, C]): those of a released checkpoint cannot be drawn again.
    """

    def __init__(
        self,
        type: str = "none",
        *,
        num_timesteps: int,
        num_channels: Sequence[int],
        alpha: float = 4.0,
        beta: float = 0.8,
        seed: int = 0,
        num_clusters: int = 8,
        update_every_steps: int = 500,
    ) -> None:
        super().__init__()
        check_routing(type, num_timesteps, alpha, beta, num_clusters, update_every_steps)
        self.kind = type
        self.num_channels = tuple(num_channels)
        self.update_every_steps = update_every_steps
        if type in WINDOW_KINDS:
            for width in sorted(set(num_channels)):
                start, stop = routing_windows(
                    type,
                    num_timesteps=num_timesteps,
                    num_channels=width,
                    alpha=alpha,
                    beta=beta,
                    num_clusters=num_clusters,
                )
                self.register_buffer(f"start_{width}", start, persistent=False)
                self.register_buffer(f"stop_{width}", stop, persistent=False)
            return
        for block, width in enumerate(num_channels):
            if type == "max_roaming":
                enter, leave = roaming_updates(num_timesteps, width, beta, seed=seed, block=block)
                self.register_buffer(f"enter_{block}", enter, persistent=False)
                self.register_buffer(f"leave_{block}", leave, persistent=False)
            else:
                mask = routing_mask(
                    type,
                    num_timesteps,
                    width,
                    beta=beta,
                    seed=seed,
                    block=block,
                    num_clusters=num_clusters,
                )
                self.register_buffer(f"mask_{block}", mask, persistent=type == "random")

    def forward(self, t: Tensor, step: int | None = None) -> list[Tensor] | list[None]:
        """Return every block's masks for timesteps t [N], bool [N, C] each; None without routing.

        `step` is the training step, which max_roaming needs: ConfigError without it.
        """
        if self.kind == "none":
            return [None] * len(self.num_channels)
        if self.kind in WINDOW_KINDS:
            masks = {
                width: window_mask(self._at("start", width, t), self._at("stop", width, t), width)
                for width in set(self.num_channels)
            }
            return [masks[width] for width in self.num_channels]
        blocks = range(len(self.num_channels))
        if self.kind != "max_roaming":
            return [self._at("mask", block, t) for block in blocks]
        if step is None:
            raise ConfigError(
                "model.routing.type: 'max_roaming' has other masks at every training step; "
                "call the network with step=..."
            )
        return [
            roaming_mask(
                self._at("enter", block, t),
                self._at("leave", block, t),
                step,
                self.update_every_steps,
            )
            for block in blocks
        ]

    def _at(self, table: str, index: int, t: Tensor) -> Tensor:
        return self.get_buffer(f"{table}_{index}")[t]


def check_routing(
    type: str,
    num_timesteps: int,
    alpha: float,
    beta: float,
    num_clusters: int,
    update_every_steps: int,
) -> None:
    """Raise ConfigError, naming the key, for settings that make no masks."""
    if type not in ROUTING_KINDS:
        accepted = ", ".join(ROUTING_KINDS)
        raise ConfigError(f"model.routing.type: {type!r} is not a routing; accepted: {accepted}")
    limits = {
        "alpha": (alpha, 0 < alpha < float("inf"), "a number above 0"),
        "beta": (beta, 0 < beta <= 1, "a number in (0, 1]"),
        "num_clusters": (
            num_clusters,
            type not in ("cdtr", "ercddt") or 1 <= num_clusters <= num_timesteps,
            f"1 to {num_timesteps} (the timesteps)",
        ),
        "update_every_steps": (update_every_steps, update_every_steps >= 1, "1 or more"),
    }
    for key, (value, accepted, what) in limits.items():
        if not accepted:
            raise ConfigError(f"model.routing.{key}: {value} is not accepted; give {what}")


def _num_active(num_channels: int, beta: float) -> int:
    """Return C_beta = floor(beta C), as the released code rounds it."""
    width = int(beta * num_channels)
    if width == 0:
        raise ConfigError(
            f"model.routing.beta: {beta} is not accepted; give a number in (0, 1] that leaves "
            f"at least one of {num_channels} channels"
        )
    return width


def _channel_order(seed: int, block: int, num_timesteps: int, num_channels: int) -> np.ndarray:
    """Return a random order of the channels for each timestep of a block, int64 [T, C]."""
    generator = keyed_generator(seed, "routing.channels", block)
    return generator.random((num_timesteps, num_channels)).argsort(axis=1)


def _cluster(num_timesteps: int, num_clusters: int) -> np.ndarray:
    """Return the cluster of each timestep, int64 [T]: equal intervals."""
    return np.arange(num_timesteps) * num_clusters // num_timesteps


def _shared_and_own(num_timesteps: int, num_channels: int, num_clusters: int) -> np.ndarray:
    """Return ERCDDT's masks, bool [T, C]: the first half is shared, the rest cut in segments."""
    shared = num_channels // 2
    owner = np.arange(num_channels - shared) * num_clusters // (num_channels - shared)
    own = owner == _cluster(num_timesteps, num_clusters)[:, None]
    return np.concatenate([np.ones((num_timesteps, shared), dtype=bool), own], axis=1)


def _int64(values: np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
