"""What the trainer needs of an engine, and nothing else.

An engine owns the network, its optimizer and their distribution over ranks. The trainer does not
know which one it has; checkpoints and EMA see its state as fragments, the same for all engines.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter: elements [offset, offset + n) of its flat whole.

    `master`, `exp_avg` and `exp_avg_sq` are fp32 views [n] of the live state: writing to them
    changes the engine (then `Engine.push_masters` brings the network's weights up to date).
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Engine(ABC):
    """A network with its optimizer. Losses are each rank's share of a sum over the global batch."""

    network: nn.Module
    """Called as it is to sample, under no_grad: by all ranks the same number of times."""

    _adam: torch.optim.AdamW
    """What makes the update; every fragment's moments are in its state."""

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, step: int) -> Tensor:
        """Return the network's output at a training step, fp32 [N, C_out, H, W]."""

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Enclose one forward and backward; gradients may be exchanged in the `last` one alone."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` [] to what will become the sum over micro-steps and ranks."""

    @abstractmethod
    def step(self) -> Tensor:
        """Clip, update the weights, clear the gradients; return the global norm before clipping.

        The norm [] stays on the device: reading it would make the host wait.
        """

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """Return this rank's parts of all parameters, the same objects' views at every call."""

    @property
    def optimizer_step(self) -> int:
        """Updates that Adam has made, for its bias correction."""
        return int(next(iter(self._adam.state.values()))["step"])

    @optimizer_step.setter
    def optimizer_step(self, step: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(step)

    @abstractmethod
    def push_masters(self) -> None:
        """Bring the network's weights up to date after fragments' masters were written to."""


def build_optimizer(
    parameters: list[nn.Parameter], *, lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return the AdamW of every engine (betas 0.9, 0.999, eps 1e-8: PyTorch's and DiT's)."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def adam_state(optimizer: torch.optim.AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """Return a parameter's Adam state, made now if the optimizer has not stepped yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for moment in ADAM_MOMENTS:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def whole_fragment(name: str, parameter: nn.Parameter, state: dict[str, Tensor]) -> Fragment:
    """Return the fragment of an fp32 parameter that this rank holds whole, with its Adam state."""
    moments = {moment: state[moment].view(-1) for moment in ADAM_MOMENTS}
    return Fragment(name, tuple(parameter.shape), 0, parameter.detach().view(-1), **moments)
