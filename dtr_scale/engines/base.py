"""Define the surface of an engine, which is all that the trainer knows of it.

An engine owns the network, its optimizer and their distribution over ranks. Checkpoints and
averages see its state as pieces, the same for all engines.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor, nn

Judge = Callable[[Tensor], Tensor]
"""Given the gradient's global norm [], returns fp32 [], 1 where no update is to be made, else 0."""

MASTER = "master"
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + n) of a flat tensor of `shape`; `data` is fp32 [n], often a view.

    Saving reads `data`, loading writes to it in place.
    """

    shape: tuple[int, ...]
    offset: int
    data: Tensor


@dataclass(frozen=True)
class Average:
    """A copy of this rank's masters that follows them, made by `Engine.new_average`."""

    masters: list[Tensor]
    """What it follows: fp32, live, as the engine lays them out."""
    values: list[Tensor]
    pieces: dict[str, Piece]
    """The values by parameter, as views."""


class Averaging(NamedTuple):
    """What an update does to an average: average += weight * (master - average)."""

    average: Average
    weight: float


class Engine(ABC):
    """A network with its optimizer. Losses are each rank's share of a sum over the global batch."""

    network: nn.Module
    """Called as it is to sample, under no_grad: by all ranks the same number of times."""

    _adam: torch.optim.AdamW
    """Makes the update; every piece's moments are in its state."""

    _pieces: dict[str, Piece]
    """This rank's part of the state by key, found once: engines never move it."""

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, step: int) -> Tensor:
        """Return the network's output at a training step, fp32 [N, C_out, H, W]."""

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Enclose one forward and backward; gradients may be exchanged in the `last` one alone."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` [] to what will become the sum over micro-steps and ranks."""

    def accumulate(
        self,
        losses_of: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        *,
        last: bool,
        end_forward: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, ...]:
        """Compute the losses of a micro-batch, and add the gradient of the last of them, a scalar.

        `losses_of(*inputs)` calls `forward`. `end_forward` is called when it is done, before
        gradients are exchanged. Losses are those of this call until the next.
        """
        with self.micro_step(last=last):
            losses = losses_of(*inputs)
            end_forward()
            self.backward(losses[-1])
        return losses

    def step(self, judge: Judge | None = None, averaging: Sequence[Averaging] = ()) -> Tensor:
        """Clip, update weights and averages, clear the gradients; return the norm before clipping.

        The norm [], of all gradients, stays on the device: reading it would make the host wait. So
        does the verdict of `judge`, which is given the norm and may leave weights, Adam's state and
        averages as they are.
        """
        norm = self._update(judge)
        self.average(averaging)
        return norm

    @abstractmethod
    def _update(self, judge: Judge | None) -> Tensor:
        """Do what `step` tells but for the averages."""

    def new_average(self) -> Average:
        """Return a copy of the masters as they are, for `step` to keep as an average of them."""
        masters = self.masters()
        live = [piece.data for piece in masters.values()]
        values = [master.clone() for master in live]
        pieces = {
            name: Piece(piece.shape, piece.offset, value)
            for (name, piece), value in zip(masters.items(), values, strict=True)
        }
        return Average(live, values, pieces)

    @torch.no_grad()
    def average(self, averaging: Iterable[Averaging]) -> None:
        """Let averages take in the masters, unless the last update was not made."""
        # ema += w (master - ema) is a step of SGD on |ema - master|^2 / 2, whose fused kernel asks
        # the device whether to make it; rounded as `lerp_` rounds for w < 1/2. Private in torch.
        for average, weight in averaging:
            torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
                average.values,
                average.masters,
                [],
                weight_decay=1.0,
                momentum=0.0,
                lr=weight,
                dampening=0.0,
                nesterov=False,
                maximize=True,
                is_first_step=False,
                found_inf=getattr(self._adam, "found_inf", None),
            )

    def _heed(self, judge: Judge | None, norm: Tensor) -> Tensor | None:
        """Let Adam and averages look at the verdict before they change anything; return it."""
        adam: Any = self._adam
        # What `GradScaler` sets, and fused kernels read on the device.
        adam.found_inf = None
        if judge:
            # Where an optimizer is offloaded its kernel runs on the host, which has to wait.
            home = next(iter(self._adam.state)).device
            adam.found_inf = judge(norm).to(home)
        return adam.found_inf

    def pieces(self) -> dict[str, Piece]:
        """Return this rank's part of masters and moments by "kind/parameter", as live views.

        After writing to masters, `push_masters` brings the network's weights up to date.
        """
        return self._pieces

    def masters(self) -> dict[str, Piece]:
        """Return this rank's part of the fp32 weights by parameter, as live views."""
        found = {key.partition("/"): piece for key, piece in self._pieces.items()}
        return {name: piece for (kind, _, name), piece in found.items() if kind == MASTER}

    def set_lr(self, lr: float) -> None:
        """Use this learning rate from the next update on: a number for its kernel, no wait."""
        for group in self._adam.param_groups:
            group["lr"] = lr

    @property
    def optimizer_step(self) -> int:
        """Updates that Adam has made, for its bias correction."""
        # Fused AdamW keeps it on the device: reading makes the host wait.
        # Of a parameter that is trained: frozen ones are not counted.
        trained = (state for p, state in self._adam.state.items() if p.requires_grad)
        return int(next(trained)["step"])

    @optimizer_step.setter
    def optimizer_step(self, step: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(step)

    @abstractmethod
    def push_masters(self) -> None:
        """Bring the network's weights up to date after masters were written to."""


class AdamSettings(TypedDict):
    """What every engine's AdamW is told; betas and eps are PyTorch's and DiT's if left out."""

    lr: float
    weight_decay: NotRequired[float]
    decayed: NotRequired[Literal["all", "matrices"]]
    """matrices: neither biases and norms nor embeddings, see `undecayed`."""
    betas: NotRequired[tuple[float, float]]
    eps: NotRequired[float]


def undecayed(network: nn.Module, settings: AdamSettings) -> set[str]:
    """Return the names of the parameters that `weight_decay` leaves alone.

    Under "matrices" all but the weights of linear layers and convolutions: vectors, tables of
    embeddings, and tensors that a module holds by another name than `weight`, as null tokens.
    """
    if settings.get("decayed", "all") == "all":
        return set()
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name != "weight" or parameter.ndim < 2 or isinstance(module, nn.Embedding)
    }


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], exempt: set[str], settings: AdamSettings
) -> torch.optim.AdamW:
    """Return the AdamW of every engine; what is `exempt` by name is a group without decay."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for name, parameter in parameters:
        groups.setdefault(name in exempt, []).append(parameter)
    weight_decay = settings.get("weight_decay", 0.0)
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": 0.0 if is_exempt else weight_decay}
            for is_exempt, group in groups.items()
        ],
        lr=settings["lr"],
        betas=settings.get("betas", (0.9, 0.999)),
        eps=settings.get("eps", 1e-8),
        # Fused works at every ZeRO stage; DeepSpeed's own Adams would be compiled for 85 s.
        fused=True,
    )


def adam_state(optimizer: torch.optim.AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """Return a parameter's Adam state, made now if the optimizer has not stepped yet."""
    # Checkpoints of step 0 need moments. Keys, dtypes and devices are those of `Adam._init_group`
    # in torch, which leaves a state that is not empty as it is.
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for moment in ADAM_MOMENTS:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def pieces_of(
    name: str,
    shape: torch.Size,
    offset: int,
    master: Tensor,
    moments: Iterable[Tensor],
) -> dict[str, Piece]:
    """Return by key the pieces of one parameter: its master and Adam's moments, flat [n] each."""
    kinds = zip((MASTER, *ADAM_MOMENTS), (master, *moments), strict=True)
    return {f"{kind}/{name}": Piece(tuple(shape), offset, data) for kind, data in kinds}


def whole_pieces(name: str, parameter: nn.Parameter, state: dict[str, Tensor]) -> dict[str, Piece]:
    """Return by key the pieces of an fp32 parameter that this rank holds whole."""
    # `view`, not `reshape`: a tensor that is not contiguous has to fail here. A copy would take
    # what is loaded and keep it from the network.
    moments = [state[moment].view(-1) for moment in ADAM_MOMENTS]
    return pieces_of(name, parameter.shape, 0, parameter.detach().view(-1), moments)


def cut_pieces(
    name: str,
    shape: torch.Size,
    offset: int,
    flat: Tensor,
    state: dict[str, Tensor],
    start: int,
    numel: int,
) -> dict[str, Piece]:
    """Return by key the pieces that lie at `start` of a flat buffer and of its Adam state."""
    moments = [cut(state[moment], start, numel) for moment in ADAM_MOMENTS]
    return pieces_of(name, shape, offset, cut(flat, start, numel), moments)


def cut(flat: Tensor, start: int, numel: int) -> Tensor:
    """Return `numel` elements of a flat tensor, as a view."""
    return flat.detach().narrow(0, start, numel)
