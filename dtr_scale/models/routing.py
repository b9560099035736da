"""Make routing masks: the channels of a block that a timestep uses (paper, sections 4.2, 4.3, F).

Masks are functions of integers and seeds. Types:

none         every channel
dtr          a window that slides with t, as the released code makes it (pseudo code 1)
dtr_eq4      the same by equation 4, with t and c counted from 0
cdtr         dtr over clusters of timesteps as tasks (appendix F)
ercddt       half of the channels for all, a segment of the other half per cluster (appendix F)
random       R-TR: other channels for each block and timestep (Strezoski et al., 2019)
max_roaming  random, then one channel is changed at every update until each timestep has visited
             all channels (Pascal et al., 2021)
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dtr_scale.errors import ConfigError
from dtr_scale.randomness import keyed_generator

_NEVER = np.iinfo(np.int16).max  # `leave` of a channel that stays: after every update


@dataclass(frozen=True)
class RoutingSpec:
    """Settings of a network's masks; ConfigError for those that make none."""

    type: str = "none"
    alpha: float = 4.0
    """How a window's shift is spread over timesteps; above 1, more of it at high timesteps."""
    beta: float = 0.8
    """Share of the channels that each timestep uses: C_beta = int(beta C)."""
    num_clusters: int = 8
    """Clusters of timesteps that share a mask (cdtr, ercddt)."""
    seed: int = 0
    """Of the draws of random and max_roaming."""
    update_every_steps: int = 500
    """Training steps between two changes of max_roaming's masks."""

    def __post_init__(self) -> None:
        limits = {
            "type": (self.type in _CLASSES, f"one of {', '.join(_CLASSES)}"),
            "alpha": (0 < self.alpha < float("inf"), "a number above 0"),
            "beta": (0 < self.beta <= 1, "a number in (0, 1]"),
            "num_clusters": (self.num_clusters >= 1, "1 or more"),
            "update_every_steps": (self.update_every_steps >= 1, "1 or more"),
        }
        for key, (accepted, what) in limits.items():
            if not accepted:
                value = getattr(self, key)
                raise ConfigError(f"model.routing.{key} = {value!r}: not accepted; give {what}")


class Routing(nn.Module):
    """The masks of all routed blocks of a network, as tables over its timesteps.

    `widths` are the channels of the blocks in forward order, the first of which has the number
    `first_block`: random draws differ from block to block.
    """

    def __init__(
        self, spec: RoutingSpec, num_timesteps: int, widths: Sequence[int], first_block: int = 0
    ) -> None:
        super().__init__()
        self.spec = spec
        self.widths = tuple(widths)
        self.blocks = range(first_block, first_block + len(widths))
        self._make_tables(num_timesteps)

    @abstractmethod
    def forward(self, t: Tensor, step: int | None = None) -> list[Tensor] | list[None]:
        """Return every block's masks for timesteps t [N], bool [N, C] each; None without routing.

        `step` is the training step, for masks that change with it: ConfigError without it.
        """

    @abstractmethod
    def _make_tables(self, num_timesteps: int) -> None: ...

    def _keep(self, name: str, table: Tensor, *, in_checkpoints: bool = False) -> None:
        # Integers and bools, which a cast of the network to bf16 leaves alone. Not in the state
        # dict, as in official files: masks follow from the settings.
        self.register_buffer(name, table, persistent=in_checkpoints)

    def _at(self, table: str, index: int, t: Tensor) -> Tensor:
        return self.get_buffer(f"{table}_{index}")[t]


class Unrouted(Routing):
    """Every block uses all channels at every timestep."""

    def _make_tables(self, num_timesteps: int) -> None:
        pass

    def forward(self, t: Tensor, step: int | None = None) -> list[None]:
        return [None] * len(self.widths)


class Windows(Routing):
    """A window of channels per timestep, two int tables [T] for all blocks of one width."""

    def _make_tables(self, num_timesteps: int) -> None:
        for width in sorted(set(self.widths)):
            start, stop = routing_windows(self.spec, num_timesteps, width)
            self._keep(f"start_{width}", start)
            self._keep(f"stop_{width}", stop)

    def forward(self, t: Tensor, step: int | None = None) -> list[Tensor]:
        # Compared here, not looked up: a bool table [T, C] would be read from memory per block.
        masks: dict[int, Tensor] = {}
        for width in set(self.widths):
            start, stop = self._at("start", width, t), self._at("stop", width, t)
            c = torch.arange(width, device=t.device)
            masks[width] = (c >= start[:, None]) & (c < stop[:, None])
        return [masks[width] for width in self.widths]


class Tables(Routing):
    """Any mask per timestep, a bool table [T, C] for each block.

    R-TR's are in the state dict (`mask_{block}`): those of a released checkpoint cannot be drawn
    again.
    """

    def _make_tables(self, num_timesteps: int) -> None:
        make, drawn = _TABLES[self.spec.type], self.spec.type == "random"
        for block, width in zip(self.blocks, self.widths, strict=True):
            mask = torch.tensor(make(self.spec, num_timesteps, width, block))
            self._keep(f"mask_{block}", mask, in_checkpoints=drawn)

    def forward(self, t: Tensor, step: int | None = None) -> list[Tensor]:
        return [self._at("mask", block, t) for block in self.blocks]


class Roaming(Routing):
    """MaxRoaming's masks, a function of the training step by two int16 tables [T, C] per block."""

    def _make_tables(self, num_timesteps: int) -> None:
        for block, width in zip(self.blocks, self.widths, strict=True):
            enter, leave = _roaming_updates(self.spec, num_timesteps, width, block)
            self._keep(f"enter_{block}", torch.tensor(enter))
            self._keep(f"leave_{block}", torch.tensor(leave))

    def forward(self, t: Tensor, step: int | None = None) -> list[Tensor]:
        if step is None:
            raise ConfigError(
                "model.routing.type = 'max_roaming': has other masks at every training step; "
                "call the network with step=..."
            )
        # Below _NEVER, or channels that stay would leave after so many updates.
        update = min(step // self.spec.update_every_steps, _NEVER - 1)
        return [
            (self._at("enter", block, t) <= update) & (update < self._at("leave", block, t))
            for block in self.blocks
        ]


def build_routing(
    spec: RoutingSpec, num_timesteps: int, widths: Sequence[int], first_block: int = 0
) -> Routing:
    """Return the masks of a network's blocks: see `Routing`."""
    return _CLASSES[spec.type](spec, num_timesteps, widths, first_block)


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
    """Return the masks m_t of all timesteps, bool [T, C], of the routing type `kind`.

    `seed` and `block` matter to random and max_roaming; the training `step` and
    `update_every_steps` to max_roaming; `num_clusters` to cdtr and ercddt; `alpha` to windows.
    Raises ConfigError for an unknown kind and for settings out of range.
    """
    spec = RoutingSpec(kind, alpha, beta, num_clusters, seed, update_every_steps)
    routing = build_routing(spec, num_timesteps, [num_channels], first_block=block)
    mask = routing(torch.arange(num_timesteps), step)[0]
    return torch.ones(num_timesteps, num_channels, dtype=torch.bool) if mask is None else mask


def routing_windows(
    spec: RoutingSpec, num_timesteps: int, num_channels: int
) -> tuple[Tensor, Tensor]:
    """Return start [T] and stop [T], int64: timestep t uses channels start[t] <= c < stop[t]."""
    width = _num_active(num_channels, spec.beta)
    start, stop = _WINDOWS[spec.type](spec, num_timesteps, num_channels - width)
    return (
        torch.tensor(start, dtype=torch.int64),
        torch.tensor(stop + width, dtype=torch.int64),
    )


def _released_windows(
    spec: RoutingSpec, num_timesteps: int, num_idle: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return where the windows start, and where they stop less C_beta, float64 [T] each."""
    # Ties round to even, as numpy in the released code does.
    start = np.round(np.linspace(0, 1, num_timesteps) ** spec.alpha * num_idle)
    return start, start


def _equation_4_windows(
    spec: RoutingSpec, num_timesteps: int, num_idle: int
) -> tuple[np.ndarray, np.ndarray]:
    # T + 1 edges, t - 1 and t in the paper's counting from 1. Where the edge moves between the two
    # a window is wider than C_beta.
    time = np.arange(num_timesteps + 1) / num_timesteps
    edge = np.floor(num_idle * time**spec.alpha)  # eq. 4
    return edge[:-1], edge[1:]


def _clustered_windows(
    spec: RoutingSpec, num_timesteps: int, num_idle: int
) -> tuple[np.ndarray, np.ndarray]:
    # The clusters stand in for the timesteps of dtr.
    start, _ = _released_windows(spec, spec.num_clusters, num_idle)
    start = start[_clusters(spec, num_timesteps)]
    return start, start


def _random_mask(
    spec: RoutingSpec, num_timesteps: int, num_channels: int, block: int
) -> np.ndarray:
    order = _channel_order(spec, num_timesteps, num_channels, block)
    mask = np.zeros((num_timesteps, num_channels), dtype=bool)
    np.put_along_axis(mask, order[:, : _num_active(num_channels, spec.beta)], True, axis=1)
    return mask


def _shared_and_own_mask(
    spec: RoutingSpec, num_timesteps: int, num_channels: int, block: int
) -> np.ndarray:
    """Return ERCDDT's masks, bool [T, C]: the first half is shared, the rest cut in segments."""
    shared = num_channels // 2
    # The cluster of each channel of the second half, in segments equal up to one channel.
    owner = np.arange(num_channels - shared) * spec.num_clusters // (num_channels - shared)
    own = owner == _clusters(spec, num_timesteps)[:, None]
    return np.concatenate([np.ones((num_timesteps, shared), dtype=bool), own], axis=1)


def _roaming_updates(
    spec: RoutingSpec, num_timesteps: int, num_channels: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return enter [T, C] and leave [T, C], int16: channel c is used by t in enter <= u < leave.

    u counts MaxRoaming's updates. Each swaps a random active channel for a random one that the
    timestep has not visited, as Pascal et al. do; after C - C_beta of them all were visited.
    """
    order = _channel_order(spec, num_timesteps, num_channels, block)
    width = _num_active(num_channels, spec.beta)
    generator = keyed_generator(spec.seed, "routing.leaving", block)
    # Which of its active channels a timestep gives up at each update, [C - C_beta, T].
    places = generator.integers(width, size=(num_channels - width, num_timesteps))
    # int16: the two tables take 4 MB for each block of DiT-L.
    enter = np.zeros((num_timesteps, num_channels), dtype=np.int16)
    leave = np.full_like(enter, _NEVER)
    t = np.arange(num_timesteps)
    active = order[:, :width].copy()
    # The order after its first C_beta channels is that in which the others are visited: a
    # permutation, so none comes twice.
    for update, (place, newcomer) in enumerate(zip(places, order[:, width:].T, strict=True), 1):
        leave[t, active[t, place]] = update
        enter[t, newcomer] = update
        active[t, place] = newcomer
    return enter, leave


def _num_active(num_channels: int, beta: float) -> int:
    """Return C_beta = floor(beta C), as the released code rounds it."""
    width = int(beta * num_channels)
    if width == 0:
        raise ConfigError(
            f"model.routing.beta = {beta}: leaves none of {num_channels} channels; "
            f"give at least {1 / num_channels:.2g}"
        )
    return width


def _channel_order(
    spec: RoutingSpec, num_timesteps: int, num_channels: int, block: int
) -> np.ndarray:
    """Return a random order of the channels for each timestep of a block, int64 [T, C]."""
    # Sorting uniform numbers permutes each row by itself. The paper's pseudo code permutes the
    # columns, which would give all timesteps one mask.
    generator = keyed_generator(spec.seed, "routing.channels", block)
    return generator.random((num_timesteps, num_channels)).argsort(axis=1)


def _clusters(spec: RoutingSpec, num_timesteps: int) -> np.ndarray:
    """Return the cluster of each timestep, int64 [T]: equal intervals."""
    if spec.num_clusters > num_timesteps:
        raise ConfigError(
            f"model.routing.num_clusters = {spec.num_clusters}: exceeds the {num_timesteps} "
            f"timesteps; give 1 to {num_timesteps}"
        )
    return np.arange(num_timesteps) * spec.num_clusters // num_timesteps


_WINDOWS: dict[str, Callable[[RoutingSpec, int, int], tuple[np.ndarray, np.ndarray]]] = {
    "dtr": _released_windows,
    "dtr_eq4": _equation_4_windows,
    "cdtr": _clustered_windows,
}
_TABLES: dict[str, Callable[[RoutingSpec, int, int, int], np.ndarray]] = {
    "ercddt": _shared_and_own_mask,
    "random": _random_mask,
}
_CLASSES: dict[str, type[Routing]] = {
    "none": Unrouted,
    **dict.fromkeys(_WINDOWS, Windows),
    **dict.fromkeys(_TABLES, Tables),
    "max_roaming": Roaming,
}
ROUTING_TYPES = tuple(_CLASSES)
